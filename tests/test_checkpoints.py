"""A checkpoint holds what trains and says on which base; nothing else loads as if it were right."""

import io
import zipfile

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn

import protune_mm
from protune_mm.base_weights import ALLOW, BASE, ZOO, own_files
from protune_mm.checkpoints import identities, note_origin, tuned_state_dict
from protune_mm.hooks import _guarded_tensors
from protune_mm.identity import KEY
from protune_mm.stages import find_family
from protune_mm.tuned import frozen_keys, frozen_tensors, tuned_parameters
from tests.conftest import EVERY, EXAMPLES, ROOT, build_protuned, build_stock, flat, image


def trained(backbone, seed=3):
    """Prompts that have moved, so that losing them shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned_parameters(backbone).values():
            parameter += 0.01 * torch.randn_like(parameter)
    return backbone


def resnet(**more):
    config = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, **more)
    return MODELS.build(config).eval()


@pytest.fixture
def base(tmp_path):
    """A file of weights, and the same as the backbone that holds them."""
    torch.manual_seed(0)
    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18))
    path = tmp_path / 'base.pth'
    torch.save(stock.state_dict(), path)
    return path


@pytest.fixture
def tuned_file(base, tmp_path):
    """A tuned-only file of a backbone on that base, and the outputs it must give."""
    backbone = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base)))
    backbone.init_weights()
    trained(backbone)
    path = tmp_path / 'tuned.pth'
    torch.save(dict(state_dict=tuned_state_dict(backbone)), path)
    return path, backbone(image())


def same(backbone, outputs):
    return all(torch.equal(a, b) for a, b in zip(flat(backbone(image())), outputs, strict=True))


@pytest.mark.parametrize(('library', 'family'), EVERY)
def test_every_backbone_loads_its_tuned_only_file(library, family):
    with DefaultScope.overwrite_default_scope(library):
        check_round_trip(library, family)


def check_round_trip(library, family):
    torch.manual_seed(0)
    stock = build_stock(library, family).state_dict()
    backbone = build_protuned(library, family)
    backbone.load_state_dict(stock, strict=False)
    trained(backbone)
    state = tuned_state_dict(backbone)
    frozen = {name for name, _ in frozen_tensors(backbone)}
    assert not frozen & set(state)
    assert frozen_keys(backbone) == set(backbone.state_dict()) - set(state)
    other = build_protuned(library, family)
    other.load_state_dict(stock, strict=False)
    other.load_state_dict(state)  # Strict: nothing counts as missing or unexpected.
    whole = other.state_dict()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_the_backbone_fetches_its_base(library, family, tmp_path, log):
    torch.manual_seed(0)
    stock = build_stock(library, family)
    # mmdet's and mmseg's Swin read the keys of a whole model only.
    prefix = 'backbone.' if (family.name, library) == ('SwinTransformer', 'mmdet') else ''
    path = tmp_path / 'base.pth'
    torch.save(dict(state_dict={prefix + k: v for k, v in stock.state_dict().items()}), path)
    init = ConfigDict(type='Pretrained', checkpoint=str(path))
    backbone = build_protuned(library, family, init_cfg=init)
    backbone.init_weights()
    trained(backbone)
    tuned = tmp_path / 'tuned.pth'
    torch.save(dict(state_dict=tuned_state_dict(backbone)), tuned)
    other = build_protuned(library, family, init_cfg=init)
    load_checkpoint(other, str(tuned), strict=True)
    whole = other.state_dict()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in backbone.state_dict().items())
    assert not [r for r in log.records if r.levelno >= 30 and KEY in r.getMessage()]


def test_the_bases_of_shipped_configs_are_of_zoos_that_are_followed():
    found = set()
    for path in ROOT.glob('configs/*_protune_*.py'):
        rule = protune_mm.load_config(str(path)).model.backbone.get('init_cfg') or {}
        found.add(rule.get('checkpoint', ''))
    found = {address for address in found if '://' in address}
    assert len(found) > 2
    assert not [address for address in found if not address.startswith(ZOO)]


def test_an_address_in_a_file_is_followed_only_when_allowed(base, tuned_file, monkeypatch):
    path, outputs = tuned_file
    backbone = resnet()
    with pytest.raises(RuntimeError, match=f'(?s){base}.*{ALLOW}=1.*base_checkpoint'):
        load_checkpoint(backbone, str(path))
    monkeypatch.setenv(ALLOW, '1')
    load_checkpoint(backbone, str(path))
    assert same(backbone, outputs)
    monkeypatch.delenv(ALLOW)
    monkeypatch.setenv(BASE, str(base))
    backbone = resnet()
    load_checkpoint(backbone, str(path))
    assert same(backbone, outputs)
    monkeypatch.delenv(BASE)
    backbone = resnet(base_checkpoint=str(base))
    load_checkpoint(backbone, str(path))
    assert same(backbone, outputs)


def test_a_model_zoo_is_followed_without_asking(base, tuned_file, monkeypatch):
    path, outputs = tuned_file
    loaded = torch.load(path, weights_only=True)
    key = f'{KEY}.origin'
    address = b'{"checkpoint": "torchvision://resnet18"}'
    loaded['state_dict'][key] = torch.tensor(list(address), dtype=torch.uint8)
    asked = []

    def fetch(url, *args, **kwargs):
        asked.append(url)
        return torch.load(base, weights_only=True)

    monkeypatch.setattr('mmengine.runner.checkpoint.load_from_http', fetch)
    backbone = resnet()
    backbone.load_state_dict(loaded['state_dict'])
    assert same(backbone, outputs)
    assert len(asked) == 1
    assert 'resnet18' in asked[0]


def test_another_base_is_an_error_that_names_both(tuned_file, base, tmp_path, monkeypatch):
    path, _ = tuned_file
    torch.manual_seed(1)
    other = tmp_path / 'other.pth'
    torch.save(MODELS.build(dict(type='mmdet.ResNet', depth=18)).state_dict(), other)
    backbone = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(other)))
    backbone.init_weights()
    with pytest.raises(RuntimeError, match=f'(?s)tuned on another base.*{base}.*{other}'):
        load_checkpoint(backbone, str(path))
    # Not loaded yet, and the wrong one is named: the same.
    monkeypatch.setenv(BASE, str(other))
    with pytest.raises(RuntimeError, match=f'(?s)tuned on another base.*{base}.*{other}'):
        load_checkpoint(resnet(), str(path))


def test_one_changed_bit_of_the_base_is_another_base(tuned_file, base):
    path, _ = tuned_file
    backbone = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base)))
    backbone.init_weights()
    weight = backbone.layer3[0].conv1.weight.data.view(torch.int32)
    weight[0, 0, 0, 0] ^= 1
    with pytest.raises(RuntimeError, match='tuned on another base'):
        load_checkpoint(backbone, str(path))


def test_a_base_that_cannot_be_read_is_an_error(tuned_file, tmp_path, monkeypatch):
    path, _ = tuned_file
    monkeypatch.setenv(BASE, str(tmp_path / 'none.pth'))
    with pytest.raises(RuntimeError, match=r'base of ResNet cannot be read from .*none\.pth'):
        load_checkpoint(resnet(), str(path))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(prompt=dict(ratio=4)), 'prompt.ratio=8.*has prompt.ratio=4'),
        (dict(prompt=dict(act_cfg=dict(type='ReLU'))), 'prompt.act_cfg.*GELU.*ReLU'),
        (dict(prompt='paper'), 'prompt.last=.residual.*series'),
        (dict(stages=['layer1']), r"blocks=\['layer1.1', .*has blocks=\['layer1.1'\]"),
        (dict(prompt=dict(type='Adapter')), 'prompt.type=.ProTuningBlock.*Adapter'),
        (dict(policy='head-only'), 'prompt.type=.ProTuningBlock.*has prompt.type=None'),
    ],
)
def test_other_prompts_are_an_error_that_names_the_option(tuned_file, base, options, message):
    path, _ = tuned_file
    backbone = resnet(base_checkpoint=str(base), **options)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=f'(?s){message}'):
        load_checkpoint(backbone, str(path))
    # Nothing of it was loaded.
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())


def test_the_start_and_training_of_prompts_is_no_other_prompt(tuned_file, base):
    path, outputs = tuned_file
    prompt = dict(zero_init=False, ratio=8, scale=1.0, drop_rate=0.5)
    backbone = resnet(base_checkpoint=str(base), prompt=prompt)
    load_checkpoint(backbone, str(path))
    assert same(backbone, outputs)


def test_a_file_that_lacks_a_prompt_is_an_error(tuned_file, base):
    path, _ = tuned_file
    state = torch.load(path, weights_only=True)['state_dict']
    for change, message in (
        (lambda s: s.pop('layer2.1.prompt.up.bias'), "lacks 'layer2.1.prompt.up.bias'"),
        (lambda s: s.update({'layer2.1.prompt.up.bias': torch.zeros(3)}), 'of shape'),
        (lambda s: s.update({'layer2.1.prompt.more': torch.zeros(3)}), "has 'layer2.1.prompt.more"),
        (lambda s: s.pop(f'{KEY}.options'), 'damaged'),
        (lambda s: s.update({f'{KEY}.options': torch.tensor([1], dtype=torch.uint8)}), 'damaged'),
    ):
        broken = dict(state)
        change(broken)
        with pytest.raises(ValueError, match=message):
            resnet(base_checkpoint=str(base)).load_state_dict(broken)


def test_a_whole_file_is_checked_too(base):
    """With the switch off a file holds the base, and still says which it is."""
    backbone = trained(resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base))))
    state = {**backbone.state_dict(), **tuned_state_dict(backbone)}
    other = resnet()
    other.load_state_dict(state)
    assert all(
        torch.equal(tensor, other.state_dict()[k]) for k, tensor in backbone.state_dict().items()
    )
    state['conv1.weight'] = state['conv1.weight'] + 1
    with pytest.raises(RuntimeError, match='tuned on another base'):
        resnet().load_state_dict(state)


class Evil:
    def __reduce__(self):
        return (print, ('code ran',))


@pytest.mark.parametrize('how', ['cut', 'flip', 'empty', 'foreign', 'malicious'])
def test_damaged_files_are_one_clear_error(tuned_file, base, how, capsys):
    path, _ = tuned_file
    raw = bytearray(path.read_bytes())
    if how == 'cut':
        raw = raw[: len(raw) // 2]
    elif how == 'flip':
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            part = max(archive.infolist(), key=lambda info: info.file_size)
            raw[part.header_offset + part.file_size // 2] ^= 4
    elif how == 'empty':
        raw = b''
    elif how == 'foreign':
        raw = b'PK\3\4 no checkpoint at all'
    path.write_bytes(raw)
    if how == 'malicious':
        torch.save(dict(state_dict=Evil()), path)
    with pytest.raises(ValueError, match=f'checkpoint {path} ') as error:
        load_checkpoint(resnet(base_checkpoint=str(base)), str(path))
    assert '\n' not in str(error.value)
    assert 'code ran' not in capsys.readouterr().out


def test_a_part_of_a_whole_models_file_can_be_the_base(tmp_path, base, monkeypatch):
    """As with `load_from`: the backbone lies below a name there."""
    state = {f'backbone.{k}': v for k, v in torch.load(base, weights_only=True).items()}
    path = tmp_path / 'detector.pth'
    torch.save(dict(state_dict={**state, 'head.weight': torch.zeros(2)}), path)
    backbone = resnet()
    backbone.load_state_dict(torch.load(base, weights_only=True))
    trained(backbone)
    backbone._protune.origin = dict(checkpoint=str(path), prefix='backbone.', model=True)
    tuned = tuned_state_dict(backbone)
    monkeypatch.setenv(ALLOW, '1')
    other = resnet()
    other.load_state_dict(tuned)
    assert same(other, flat(backbone(image())))


def test_a_head_inside_the_frozen_part_is_told(log):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1, self.fc = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.layer1(x).mean((2, 3)))

    net = protune_mm.protune(Net(), stages=['layer1'])
    assert "'fc' of Net looks like a classifier, and is frozen, too" in log.text
    tuned_state_dict(net)
    net.fc = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"'fc\.weight' requires a gradient, and is of a backbone"):
        tuned_state_dict(net)


def test_merged_and_given_modules_have_an_identity_too():
    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18))
    backbone = trained(protune_mm.protune(stock))
    state = tuned_state_dict(backbone)
    again = protune_mm.protune(MODELS.build(dict(type='mmdet.ResNet', depth=18)))
    with pytest.raises(RuntimeError, match='tuned on another base'):
        again.load_state_dict(state)


def test_weights_of_which_a_part_came_from_no_file_stay_in_the_file(base, tmp_path):
    """Those of a plugin, say, which no ImageNet checkpoint has, start at random."""
    state = torch.load(base, weights_only=True)
    part = {key: tensor for key, tensor in state.items() if not key.startswith('layer4.1')}
    torch.save(part, tmp_path / 'part.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'part.pth'))
    backbone = resnet(init_cfg=init)
    backbone.init_weights()
    trained(backbone)
    tuned, outputs = tuned_state_dict(backbone), flat(backbone(image()))
    for _ in range(2):
        assert 'layer4.1.conv1.weight' in tuned
        other = resnet(init_cfg=init)
        other.init_weights()
        other.load_state_dict(tuned)
        assert same(other, outputs)
        tuned = tuned_state_dict(other)  # Loaded from one file, it still is of no other.
    other._protune.origin = dict(checkpoint='detector.pth', prefix='backbone.', model=True)
    other.load_state_dict(tuned)
    assert 'layer4.1.conv1.weight' in tuned_state_dict(other)


def test_a_detector_checkpoint_that_lacks_a_part_is_not_the_base(base, tmp_path):
    state = {f'module.backbone.{k}': v for k, v in torch.load(base, weights_only=True).items()}
    for lacks in (False, True):
        model = nn.ModuleDict(dict(backbone=resnet()))
        path = tmp_path / f'{lacks}.pth'
        held = {k: v for k, v in state.items() if not (lacks and 'layer4.1' in k)}
        torch.save(dict(state_dict=held), path)
        checkpoint = load_checkpoint(model, str(path))
        note_origin(model, checkpoint, str(path))
        assert model.backbone._protune.origin['checkpoint'] == str(path)
        assert ('backbone.layer4.1.conv1.weight' in tuned_state_dict(model)) == lacks


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('whole', [False, True])
def test_init_cfg_may_name_a_file_with_prompts(base, tmp_path, monkeypatch, whole, prefix):
    backbone = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base)))
    backbone.init_weights()
    trained(backbone)
    frozen = backbone.state_dict() if whole else {}
    state = {f'{prefix}{k}': v for k, v in (frozen | tuned_state_dict(backbone)).items()}
    torch.save(dict(state_dict=state), tmp_path / 'tuned.pth')
    monkeypatch.setenv(ALLOW, '1')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'tuned.pth'))
    other = resnet(init_cfg=init | (dict(prefix=prefix) if prefix else {}), require_weights=True)
    for _ in range(2):
        other.init_weights()
        assert same(other, flat(backbone(image())))
    with pytest.raises(ValueError, match=r'prompt\.hidden'):
        resnet(init_cfg=other.init_cfg, prompt=dict(hidden=3)).init_weights()


def test_a_file_with_prompts_in_init_cfg_needs_a_base_that_can_be_had(base, tmp_path):
    backbone = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base)))
    backbone.init_weights()
    trained(backbone)
    torch.save(dict(state_dict=tuned_state_dict(backbone)), tmp_path / 'tuned.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'tuned.pth'))
    with pytest.raises(RuntimeError, match=rf'names .*, which is of no model zoo: set {ALLOW}=1'):
        resnet(init_cfg=init).init_weights()
    other = resnet(init_cfg=init, base_checkpoint=str(base))
    other.init_weights()
    assert same(other, flat(backbone(image())))
    slip = str(tmp_path / 'tuned.pth')
    with pytest.raises(RuntimeError, match=r'tuned\.pth: \S*tuned\.pth holds prompts, and not'):
        resnet(base_checkpoint=slip).load_state_dict(tuned_state_dict(backbone))


def test_the_base_of_load_from_is_found_beside_init_cfg(tmp_path, base, monkeypatch):
    """The config loads ImageNet weights; the training began with those of a detector."""
    torch.manual_seed(2)
    detector = MODELS.build(dict(type='mmdet.ResNet', depth=18)).state_dict()
    path = tmp_path / 'detector.pth'
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in detector.items()}), path)
    init = dict(type='Pretrained', checkpoint=str(base))
    backbone = resnet(init_cfg=init)
    backbone.init_weights()
    backbone.load_state_dict(detector)
    trained(backbone)
    backbone._protune.origin = dict(checkpoint=str(path), prefix='backbone.', model=True)
    tuned, outputs = tuned_state_dict(backbone), flat(backbone(image()))
    with pytest.raises(RuntimeError, match=f'another base.*{ALLOW}=1'):
        resnet(init_cfg=init).load_state_dict(tuned)
    monkeypatch.setenv(ALLOW, '1')
    other = resnet(init_cfg=init)
    other.load_state_dict(tuned)
    assert same(other, outputs)
    monkeypatch.delenv(ALLOW)
    # A training that resumes has loaded `init_cfg` already.
    other = resnet(init_cfg=init)
    other.init_weights()
    with own_files():
        other.load_state_dict(tuned)
    assert same(other, outputs)


@pytest.mark.parametrize(
    'config',
    [
        dict(base='mmpretrain.TinyViT', arch='5m', img_size=(64, 64)),
        dict(base='mmdet.ResNet', depth=18),
    ],
    ids=lambda config: config['base'],
)
def test_a_whole_file_needs_no_base(config):
    """Index tables that no state has are none of its weights."""
    config = dict(type='protune_mm.ProTuned', **config)
    one, other = trained(MODELS.build(config)), MODELS.build(config)
    state = one.state_dict()
    other.load_state_dict(state | identities(one))
    assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in state.items())
    assert other.protune_fingerprint() == one.protune_fingerprint()


def test_tables_that_follow_from_the_image_are_no_part_of_the_base():
    """ViTEVA02 replaces them in its forward pass at another size."""
    config = dict(
        type='protune_mm.ProTuned',
        base='mmpretrain.ViTEVA02',
        arch=dict(num_layers=2, embed_dims=32, num_heads=2, feedforward_channels=64),
        img_size=28,
        patch_size=14,
        out_type='featmap',
    )
    one, other = trained(MODELS.build(config)), MODELS.build(config)
    with torch.no_grad():
        one(image(1, 56, 56))
    assert one.rope.freqs_cos.shape != other.rope.freqs_cos.shape
    frozen = {key: one.state_dict()[key] for key in frozen_keys(one) if 'freqs' not in key}
    other.load_state_dict(frozen, strict=False)
    assert one.protune_fingerprint() == other.protune_fingerprint()
    assert other._protune.loads.problem(other, dict(frozen_tensors(other))) is None
    before = dict(_guarded_tensors(one))
    with torch.no_grad():
        one(image(1, 28, 56))
    after = dict(_guarded_tensors(one))
    assert len(before) > 10
    assert all(after[name] is tensor for name, tensor in before.items())


@pytest.mark.parametrize('prefix', ['backbone.', ''])
@pytest.mark.parametrize('recorded', ['backbone.', ''])
def test_a_file_that_the_user_names_may_be_of_a_whole_model_or_not(
    base, tmp_path, monkeypatch, recorded, prefix
):
    weights = torch.load(base, weights_only=True)

    def held(name, prefix):
        path = tmp_path / name
        torch.save(dict(state_dict={prefix + k: v for k, v in weights.items()}), path)
        return str(path)

    init = dict(type='Pretrained', checkpoint=held('recorded.pth', recorded))
    backbone = resnet(init_cfg=dict(init, prefix=recorded) if recorded else init)
    backbone.init_weights()
    trained(backbone)
    path = tmp_path / 'tuned.pth'
    torch.save(dict(state_dict=tuned_state_dict(backbone)), path)
    monkeypatch.setenv(BASE, held('given.pth', prefix))
    other = resnet()
    load_checkpoint(other, str(path))
    assert same(other, backbone(image()))


def test_weights_that_took_the_place_of_the_base_stay_in_the_file(base, tmp_path, monkeypatch):
    """A hook or a model of the user's has loaded them: `init_cfg` no longer says where from."""
    backbone = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base)))
    backbone.init_weights()
    assert not frozen_keys(backbone) & tuned_state_dict(backbone).keys()
    torch.manual_seed(7)
    domain = MODELS.build(dict(type='mmdet.ResNet', depth=18)).state_dict()
    backbone.load_state_dict(domain, strict=False)
    trained(backbone)
    state = tuned_state_dict(backbone)
    assert frozen_keys(backbone) <= state.keys()
    path = tmp_path / 'tuned.pth'
    torch.save(dict(state_dict=state), path)
    other = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base)))
    other.init_weights()
    load_checkpoint(other, str(path))
    assert same(other, backbone(image()))


def test_the_same_weights_again_are_the_base_still(base):
    """As when the best state of an early stop is put back."""
    backbone = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base)))
    backbone.init_weights()
    best = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    backbone.load_state_dict(best)
    load_checkpoint(backbone, str(base))
    assert not frozen_keys(backbone) & tuned_state_dict(backbone).keys()


@pytest.mark.parametrize('recorded', [True, False])
def test_a_swin_takes_the_file_of_its_model_or_of_itself(tmp_path, monkeypatch, recorded):
    """Its own initialization reads keys of a whole model alone."""
    family = find_family(MODELS.get('mmdet.SwinTransformer'))
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        weights = build_stock('mmdet', family).state_dict()
        whole, own = tmp_path / 'whole.pth', tmp_path / 'own.pth'
        torch.save(dict(state_dict={f'backbone.{k}': v for k, v in weights.items()}), whole)
        torch.save(dict(state_dict=weights), own)
        init = ConfigDict(type='Pretrained', checkpoint=str(whole))
        backbone = build_protuned('mmdet', family, init_cfg=init)
        backbone.init_weights()
        path = tmp_path / 'tuned.pth'
        torch.save(dict(state_dict=tuned_state_dict(trained(backbone))), path)
        monkeypatch.setenv(BASE, str(whole if recorded else own))
        other = build_protuned('mmdet', family)
        load_checkpoint(other, str(path))
    assert same(other, flat(backbone(image())))


def test_a_head_that_is_loaded_leaves_the_base_what_it_was(base):
    backbone = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(base)))
    backbone.init_weights()
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.Linear(2, 2)))
    head = {key: value for key, value in model.state_dict().items() if 'head' in key}
    model.load_state_dict(head, strict=False)
    assert not frozen_keys(model) & tuned_state_dict(model).keys()
