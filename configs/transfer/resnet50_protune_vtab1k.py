# VTAB-1k (arXiv 1910.04867): one of its 19 tasks, 800 images to train on and 200 to validate. The
# environment variable VTAB_TASK names it, by its folder in the copy of the sets that prompt and adapter
# papers share: data/vtab-1k/TASK with train800.txt, val200.txt, test.txt (a line: image, label) and
# images/. When rates and widths are chosen, train on all thousand and take the last checkpoint, as the
# images that validate are among them:
#     VTAB_TASK=dtd python tools/train.py configs/transfer/resnet50_protune_vtab1k.py \
#         --cfg-options train_dataloader.dataset.ann_file=train800val200.txt \
#         default_hooks.checkpoint.save_best=None
_base_ = ['./_base_/resnet50.py']

classes = dict(
    caltech101=102, cifar=100, clevr_count=8, clevr_dist=6, diabetic_retinopathy=5, dmlab=6,
    dsprites_loc=16, dsprites_ori=16, dtd=47, eurosat=10, kitti=4, oxford_flowers102=102,
    oxford_iiit_pet=37, patch_camelyon=2, resisc45=45, smallnorb_azi=18, smallnorb_ele=9,
    sun397=397, svhn=10,
)  # fmt: skip
task = '{{$VTAB_TASK:caltech101}}'
if task not in classes:
    raise ValueError(f"VTAB_TASK='{task}' is none of VTAB's tasks: use {', '.join(classes)}")

# As the protocol has it: all of the image, and no augmentation.
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(224, 224), interpolation='bicubic', backend='pillow'),
    dict(type='PackInputs'),
]
images = dict(
    _delete_=True, type='CustomDataset', data_root=f'data/vtab-1k/{task}', pipeline=pipeline
)
model = dict(head=dict(num_classes=classes[task], topk=(1,)))
data_preprocessor = dict(num_classes=classes[task])
train_dataloader = dict(batch_size=64, dataset=dict(ann_file='train800.txt', **images))
val_dataloader = dict(dataset=dict(ann_file='val200.txt', **images))
test_dataloader = dict(dataset=dict(ann_file='test.txt', **images))
# Some tasks have fewer than five classes.
val_evaluator = dict(topk=(1,))
test_evaluator = dict(topk=(1,))
train_cfg = dict(max_epochs=100)
# Each task has its own.
work_dir = f'work_dirs/resnet50_protune_vtab1k/{task}'
