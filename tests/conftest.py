"""What all tests share: no network, a seed, tiny models of many families, and the folder of shared models."""

import gc
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as workers; what tests start has one as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not spoil a later fork

import pytest
import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS = 96, 64, 2
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*LLAMA_LIKE, "gemma2", "phi3", "gpt2", "opt", "bert")
_LIKE_OTHERS = ("llama", "mistral", "qwen2", "phi3")
KINDS = [pytest.param(family, marks=pytest.mark.slow if family in _LIKE_OTHERS else ()) for family in FAMILIES]
"""All families, for tests that take a second for each; slow are those of which Qwen3 and the others have every part."""

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FORMS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN}),
    "bert": ("BertConfig", "BertForMaskedLM", {}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {"num_local_experts": 4}),
    "recurrent_gemma": (  # depthwise convolutions
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {
            "lru_width": HIDDEN,
            "intermediate_size": 192,
            "num_key_value_heads": 1,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "moe_latent_size": None},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "moe_layers": [0, 1], "no_rope_layers": [1, 0]}
        | {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 32}
        | {"num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {"num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32}
        | {"ffn_hidden_size": 96, "q_lora_rank": 32, "kv_lora_rank": 32, "num_key_value_heads": 4}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"time_step_rank": 8, "state_size": 8, "num_hidden_layers": LAYERS}),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4}),
    "bart": (
        "BartConfig",
        "BartForCausalLM",
        {"d_model": HIDDEN, "decoder_layers": LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
        | {"is_decoder": True, "is_encoder_decoder": False},
    ),
    "afmoe": ("AfmoeConfig", "AfmoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 32}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {"num_experts": 4, "moe_topk": 2}),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {"num_local_experts": 4}),
    "jetmoe": ("JetMoeConfig", "JetMoeForCausalLM", {"num_local_experts": 4, "kv_channels": 16}),
    "dbrx": (
        "DbrxConfig",
        "DbrxForCausalLM",
        {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}
        | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}}
        | {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
}


gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what importing made, instead of looking through it again and again."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection to another machine, so that no test depends on the network without saying so."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if request.node.get_closest_marker("slow"):
        return  # building a wheel may need its build tools
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and str(address[0]) not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise OSError(f"tests run offline: refused a connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder `shared/models` beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "models"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def build_model(family: str, **changes: object) -> nn.Module:
    """A randomly initialized model of `family` in evaluation mode; `changes` are keys of its configuration."""
    import transformers

    config_name, model_name, own = _FORMS[family]
    torch.manual_seed(7)
    config = getattr(transformers, config_name)(**{**_COMMON, **own, **changes})
    model = getattr(transformers, model_name)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        # initialization is so small that everything would be linear: larger weights make attention and norms count
        if parameter.dim() > 1:
            parameter.mul_(3)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """`build_model`, as a fixture."""
    return build_model


@pytest.fixture
def token_batches() -> list[Tensor]:
    """Three batches of token ids [2, T] of different lengths."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (2, length), generator=generator) for length in (12, 9, 16)]


@pytest.fixture
def threads() -> Iterator[None]:
    """One thread, for what is compared to the bit over runs of different shape."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts an MLflow database at a path, its tables made and empty: to make them takes longer than many a run."""
    made = tmp_path_factory.mktemp("store") / "mlflow.db"

    def place(path: Path) -> None:
        if not made.exists():
            from mlflow import MlflowClient

            MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments()
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, path)

    return place


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of the given size (MiB); needs root and the right to mount."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("cannot mount a small file system here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
