# Classification at the size the weights were made for, on one GPU.
flowers5_224 = dict(
    steps=600,
    cfg_options={
        'train_dataloader.batch_size': 32,
        'train_dataloader.dataset.pipeline.1.scale': 224,
        'val_dataloader.dataset.pipeline.1.scale': (224, 224),
        'test_dataloader.dataset.pipeline.1.scale': (224, 224),
    },
)
