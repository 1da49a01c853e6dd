"""Files in the official layout, made here, into towers and heads."""

import pytest
import torch

from fulgurite.backbones.open_clip_video_text import OpenClipVideoText
from fulgurite.backbones.retrieval_checkpoints import load_retrieval_checkpoint, read_retrieval_checkpoint
from fulgurite.checkpoints.errors import CheckpointError, MismatchError, RefusedError
from fulgurite.methods.retrieval.clip4clip import Clip4Clip
from fulgurite.methods.retrieval.features import TextTokens, VideoTokens
from fulgurite.methods.retrieval.ucofia import Ucofia
from fulgurite.methods.retrieval.xclip import XClip

WIDTH, FRAMES, WORDS, CONTEXT = 32, 3, 6, 12
CONFIG = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2},
}
SIZES = {"max_frames": FRAMES, "temporal_layers": 2}
SELECTOR = "visual_token_selector.score_predictor."


@pytest.fixture(scope="module")
def towers():
    return OpenClipVideoText(CONFIG, None, num_frames=FRAMES, max_words=WORDS)


def backbone_of(**options):
    return OpenClipVideoText(
        **{"model": CONFIG, "pretrained": None, "num_frames": FRAMES, "max_words": WORDS} | options
    )


def built(head, towers):
    head.build(towers.tower_facts())
    return head.eval()


def temporal_shapes():
    block = {
        "attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "attn.in_proj_bias": (3 * WIDTH,),
        "attn.out_proj.weight": (WIDTH, WIDTH),
        "attn.out_proj.bias": (WIDTH,),
        "ln_1.weight": (WIDTH,),
        "ln_1.bias": (WIDTH,),
        "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
        "mlp.c_fc.bias": (4 * WIDTH,),
        "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        "mlp.c_proj.bias": (WIDTH,),
        "ln_2.weight": (WIDTH,),
        "ln_2.bias": (WIDTH,),
    }
    return {"frame_position_embeddings.weight": (CONTEXT, WIDTH)} | {
        f"transformerClip.resblocks.{number}.{name}": shape for number in (0, 1) for name, shape in block.items()
    }


def square(names, size):
    return dict.fromkeys(names.split(), (size, size))


def selector_shapes(video):
    inputs, hidden = (2 * WIDTH, WIDTH) if video else (WIDTH, WIDTH // 2)
    return {
        f"{SELECTOR}in_conv.0.weight": (inputs,),
        f"{SELECTOR}in_conv.0.bias": (inputs,),
        f"{SELECTOR}in_conv.1.weight": (hidden, inputs),
        f"{SELECTOR}out_conv.0.weight": (hidden, 2 * hidden),
        f"{SELECTOR}out_conv.2.weight": (1, hidden),
    }


XCLIP = (
    square("global_mat_weight local_mat_weight", WIDTH)
    | square("word_logit_weight word_mat_weight word_mat_weight2", WORDS)
    | square("frame_logit_weight frame_mat_weight frame_mat_weight2", FRAMES)
)
UCOFIA = (
    XCLIP
    | square("global_mat_weight_1 local_mat_weight1", WIDTH)
    | square("word_mat_weight_for_pixel", WORDS)
    | square("pixel_mat_weight pixel_mat_weight2", 4 * FRAMES)
)
LAYOUTS = {
    "ucofia-video": (UCOFIA | selector_shapes(True) | temporal_shapes(), lambda: Ucofia(max_words=WORDS, **SIZES)),
    "ucofia-frame": (
        UCOFIA | selector_shapes(False),
        lambda: Ucofia(max_words=WORDS, selector="frame", temporal="mean", max_frames=FRAMES),
    ),
    "xclip": (XCLIP | temporal_shapes(), lambda: XClip(max_words=WORDS, **SIZES)),
    "clip4clip": ({}, lambda: Clip4Clip(FRAMES)),
    "clip4clip-transformer": (temporal_shapes(), lambda: Clip4Clip(FRAMES, "transformer", 2)),
}
NEVER_USED = {"word_logit_weight", "frame_mat_weight", "frame_mat_weight2", "word_mat_weight_for_pixel"}


def official(towers, layout, wrapped=()):
    """A state as the published code saves it: CLIP in half precision, the attention of some blocks wrapped."""
    shapes = {f"clip.{name}": tensor.shape for name, tensor in towers.model.state_dict().items()} | LAYOUTS[layout][0]
    state = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(place))
        for place, (name, shape) in enumerate(shapes.items())
    }
    for name in [name for name in state if name.startswith("clip.")]:
        tensor, renamed = state.pop(name).half(), name
        for block in wrapped:
            attention = f"visual.transformer.resblocks.{block}.attn."
            renamed = renamed.replace(attention, f"{attention}net.")
        state[renamed] = tensor
    return state


def write(path, state):
    torch.save(state, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_arrives_where_it_belongs(towers, layout, tmp_path):
    state, backbone = official(towers, layout), backbone_of()
    head = built(LAYOUTS[layout][1](), towers)
    weights = load_retrieval_checkpoint(write(tmp_path / "pytorch_model.bin.4", state), backbone, head)
    assert all(torch.equal(own, state[f"clip.{name}"].float()) for name, own in backbone.model.state_dict().items())
    own = head.state_dict()
    assert torch.equal(own.pop("logit_scale"), state["clip.logit_scale"].float().reshape(1))
    left = {name: tensor for name, tensor in state.items() if not name.startswith("clip.")}
    unused = NEVER_USED if layout.startswith("ucofia") else set()
    assert set(weights.never_used) == unused
    assert len(own) == len(left) - len(unused)
    for tensor in own.values():  # all values of the file differ, so that equal ones tell where they come from
        (source,) = [name for name, value in left.items() if torch.equal(value, tensor)]
        del left[source]
    assert set(left) == unused
    assert backbone.source == str(tmp_path / "pytorch_model.bin.4")
    assert own.keys() or layout == "clip4clip"


def test_matrices_of_ucofia_have_the_places_of_the_equations(towers, tmp_path):
    state = official(towers, "ucofia-video")
    head = read_retrieval_checkpoint(write(tmp_path / "file", state), built(LAYOUTS["ucofia-video"][1](), towers)).head
    places = {
        "sentence_projection": "global_mat_weight",
        "video_projection": "global_mat_weight_1",
        "frame_matrix.weight": "frame_logit_weight",
        "word_projection": "local_mat_weight",
        "patch_projection": "local_mat_weight1",
        "word_matrix.weight": "word_mat_weight",
        "word_matrix_2.weight": "word_mat_weight2",
        "patch_matrix.weight": "pixel_mat_weight",
        "patch_matrix_2.weight": "pixel_mat_weight2",
        "patch_selector.joint.weight": f"{SELECTOR}out_conv.0.weight",
        "video_vector.encoder.blocks.1.ln_2.bias": "transformerClip.resblocks.1.ln_2.bias",
    }
    assert all(torch.equal(head[own], state[name]) for own, name in places.items())


def test_both_spellings_of_shifted_attention_give_the_same_model(towers, tmp_path):
    states = []
    for wrapped in ((), (1, 2)):
        path = write(tmp_path / "file", official(towers, "ucofia-frame", wrapped))
        assert any(".attn.net." in name for name in torch.load(path)) == bool(wrapped)
        backbone = backbone_of(patch_shift=list(wrapped))
        weights = load_retrieval_checkpoint(path, backbone, built(LAYOUTS["ucofia-frame"][1](), towers))
        assert weights.shifted == wrapped
        states.append(backbone.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_an_imported_head_scores_the_same_after_storage(towers, tmp_path):
    path = write(tmp_path / "file", official(towers, "ucofia-video"))
    generator = torch.Generator().manual_seed(0)
    texts = TextTokens(
        torch.randn(2, WIDTH, generator=generator),
        torch.randn(2, WORDS, WIDTH, generator=generator),
        torch.ones(2, WORDS) > 0,
    )
    videos = VideoTokens(torch.randn(3, FRAMES, 17, WIDTH, generator=generator), torch.ones(3, FRAMES) > 0)
    scores = []
    for again in (False, True):
        head = built(LAYOUTS["ucofia-video"][1](), towers)
        if again:
            head.load_state_dict(torch.load(tmp_path / "own"))
        else:
            load_retrieval_checkpoint(path, backbone_of(), head)
            torch.save(head.state_dict(), tmp_path / "own")
        with torch.no_grad():
            scores.append(head.similarity(head.embed_text(texts), head.embed_video(videos)))
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    ("layout", "head", "advice"),
    [
        ("ucofia-video", lambda: Ucofia(max_words=9, **SIZES), r"init_args max_words: 6\."),
        (
            "ucofia-video",
            lambda: Ucofia(max_frames=5, max_words=WORDS, temporal_layers=2),
            r"init_args max_frames: 3\.",
        ),
        ("ucofia-video", lambda: Ucofia(max_words=WORDS, selector="frame", **SIZES), r"init_args selector: video\."),
        ("ucofia-video", lambda: Ucofia(max_words=WORDS, top_k=2, **SIZES), r"init_args top_k: 3\."),
        ("ucofia-video", lambda: Ucofia(max_words=WORDS, isa="relative", **SIZES), r"init_args isa: full\."),
        ("ucofia-video", lambda: Ucofia(max_words=WORDS, temporal="mean", max_frames=FRAMES), "temporal: transformer"),
        (
            "ucofia-video",
            lambda: Ucofia(max_words=WORDS, visual_local_matrix=True, levels=["video_sentence"], **SIZES),
            "levels",
        ),
        ("ucofia-frame", lambda: Ucofia(max_words=WORDS, **SIZES), "temporal: mean, selector: frame"),
        (
            "xclip",
            lambda: XClip(max_words=WORDS, max_frames=FRAMES, temporal_layers=1),
            r"init_args temporal_layers: 2\.",
        ),
        ("xclip", lambda: Ucofia(max_words=WORDS, **SIZES), "made with XClip: set model.init_args.head"),
        ("clip4clip", lambda: Clip4Clip(FRAMES, "transformer", 2), r"init_args temporal: mean\."),
    ],
)
def test_another_head_than_the_files_is_refused_with_the_option_to_change(towers, layout, head, advice, tmp_path):
    head, backbone = built(head(), towers), backbone_of()
    before = {**head.state_dict(), **backbone.state_dict()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(MismatchError, match=advice):
        load_retrieval_checkpoint(write(tmp_path / "file", official(towers, layout)), backbone, head)
    after = {**head.state_dict(), **backbone.state_dict()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_all_that_does_not_fit_is_listed_at_once(towers, tmp_path):
    state = official(towers, "xclip")
    state["clip.visual.proj"] = torch.zeros(3, 3)
    state["extra"] = state.pop("local_mat_weight")
    del state["clip.ln_final.bias"]
    with pytest.raises(MismatchError) as error:
        load_retrieval_checkpoint(write(tmp_path / "file", state), backbone_of(), built(LAYOUTS["xclip"][1](), towers))
    assert str(error.value).splitlines()[1:-1] == [
        "  extra: in the file, not in the model",
        f"  head.word_projection: missing, model {(WIDTH, WIDTH)}",
        f"  backbone.visual.proj: file (3, 3), model {(32, WIDTH)}",
        "  backbone.ln_final.bias: missing, model (32,)",
    ]


def test_published_evaluation_has_no_matrix_for_patches(towers, tmp_path):
    head = built(Ucofia(max_words=WORDS, visual_local_matrix=False, **SIZES), towers)
    weights = read_retrieval_checkpoint(write(tmp_path / "file", official(towers, "ucofia-video")), head)
    assert set(weights.never_used) == NEVER_USED | {"local_mat_weight1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross.pooler.dense.weight": torch.ones(1)}, "tightTransf"),
        ({"lstm_visual.weight_ih_l0": torch.ones(1)}, "seqLSTM"),
        ({"clip.visual.transformer.resblocks.1.attn.net.in_proj_bias": torch.ones(1)}, "in_proj_bias twice"),
        ({"epoch": 3}, "expected names and tensors"),
    ],
)
def test_files_of_other_kinds_are_refused(towers, change, message, tmp_path):
    path = write(tmp_path / "file", official(towers, "clip4clip") | change)
    with pytest.raises(MismatchError, match=message):
        read_retrieval_checkpoint(path, built(Clip4Clip(), towers))


def test_what_is_no_checkpoint_is_refused(towers, tmp_path):
    head = built(Clip4Clip(), towers)
    with pytest.raises(MismatchError, match="no tensors clip"):
        read_retrieval_checkpoint(write(tmp_path / "file", {"a": torch.ones(1)}), head)
    with pytest.raises(CheckpointError, match="no file"):
        read_retrieval_checkpoint(tmp_path / "absent", head)
    (tmp_path / "file").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(RefusedError, match=r"posix\.system"):
        read_retrieval_checkpoint(tmp_path / "file", head)


@pytest.mark.parametrize(
    ("options", "layout", "wrapped", "message"),
    [
        ({"model": CONFIG | {"quick_gelu": False}}, "clip4clip", (), "quick_gelu: true"),
        ({}, "ucofia-frame", (1, 2), r"blocks \[1, 2\], the backbone has it in \[\]"),
        ({"patch_shift": [1]}, "clip4clip", (), r"blocks \[\], the backbone has it in \[1\]"),
    ],
)
def test_towers_that_compute_something_else_are_refused(towers, options, layout, wrapped, message, tmp_path):
    path = write(tmp_path / "file", official(towers, layout, wrapped))
    with pytest.raises(MismatchError, match=message):
        load_retrieval_checkpoint(path, backbone_of(**options), built(LAYOUTS[layout][1](), towers))


def test_other_backbones_and_heads_have_no_published_files(towers, tmp_path):
    class Other(Clip4Clip):
        pass

    path = write(tmp_path / "file", official(towers, "clip4clip"))
    with pytest.raises(MismatchError, match="Other has no published checkpoints"):
        read_retrieval_checkpoint(path, built(Other(), towers))
    with pytest.raises(MismatchError, match="which Linear has not: set backbone"):
        load_retrieval_checkpoint(path, torch.nn.Linear(1, 1), built(Clip4Clip(), towers))
