"""The sections of a run's settings, one frozen type each. `localrl.config` puts them together as `Run`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from localrl.settings import Settings

Gguf = Literal["q8_0", "q4_k_m", "f16", "f32"]
"""What llama.cpp's copy of the base is rounded to."""


class ModelSettings(Settings):
    """Which model learns, and in which form its frozen weights are held."""

    path: str = "demo"
    """A local folder, a hub id ("Qwen/Qwen3-4B"), or "demo" for the embedded one."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """Of the frozen base: nf4 (4 bit, double quantisation), int8 (LLM.int8), none."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations and of what is not quantised. auto: bfloat16 on a GPU that has it, float32 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train. auto: the GPU if there is one."""


class AdapterSettings(Settings):
    """The LoRA adapter, the only thing that learns. Always held in float32."""

    lora_r: int = Field(16, ge=1, le=1024)
    """Rank."""
    lora_alpha: float = Field(32.0, gt=0)
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get one; all-linear: every one but the output layer."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead (rsLoRA)."""
    lora_dropout: float = 0.0
    """Must be 0: with dropout, the log-probabilities of sampling and of learning are not those of one policy."""

    @field_validator("lora_dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError("must be 0: with dropout the sampled policy and the trained one differ; leave it out")
        return value


class RolloutSettings(Settings):
    """How responses are sampled."""

    prompts_per_step: int = Field(8, ge=1)
    """Prompts of one step."""
    num_generations: int = Field(8, ge=1)
    """Rollouts of each prompt: the group."""
    max_completion_length: int = Field(256, ge=1)
    """Longest response, tokens."""
    temperature: float = Field(1.0, ge=0, le=5)
    """Of sampling, and of the log-probabilities that are trained. 0 (greedy) is for evaluation only."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1: off. Truncation makes the sampled policy differ from the trained one."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0: off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, beside the model's own end tokens."""
    concurrent: int | None = Field(None, ge=1)
    """Most sequences decoded at once; unset: what the memory plan finds."""
    window: int | None = Field(None, ge=1)
    """Most tokens that a response grows by in one step; an unfinished one goes on in the next, a finished one makes room. Unset: whole responses."""
    dynamic_sampling: bool = False
    """Sample on until prompts_per_step groups are together whose rewards differ within the group (DAPO)."""
    max_resamples: int = Field(4, ge=0)
    """Most additional rounds of dynamic_sampling; after that the step makes do with what there is."""
    weights: Literal["auto", "live", "unpacked"] = "auto"
    """live: decode with the quantised layers. unpacked: with a scratch copy of the very same weights, freed before learning (faster on a CPU)."""
    engine: Literal["torch", "llama_cpp", "auto"] = "torch"
    """Who samples. torch: the very weights that learn. llama_cpp: a GGUF of the same base and the adapter as it is, often faster on a CPU and not quite
    the policy, which the algorithm then corrects for. auto: whoever is quicker here, tried for some seconds when the run starts."""
    gguf: Literal["auto", "q8_0", "q4_k_m", "f16", "f32"] = "auto"
    """What llama_cpp's copy of the base is rounded to. auto: q8_0, or q4_k_m where memory is short."""
    threads: int | None = Field(None, ge=1, le=256)
    """Threads of llama_cpp. Unset: tried when the run starts, and again when sampling has become much slower."""


class ReplayFilter(Settings):
    """A condition on a reward."""

    reward: str = Field(min_length=1)
    """The reward's name."""
    at_least: float = 0.0
    """A rollout with less, or without this reward, is not kept."""


class ReplaySettings(Settings):
    """Learning from rollouts more than once, and from those of older policies. Nothing of it is on while `capacity` is 0."""

    capacity: int = Field(0, ge=0)
    """Rollouts kept of each prompt, the newest ones. 0: each rollout is learned from once, in the step that sampled it."""
    recent: float = Field(0.5, ge=0, le=1)
    """Share of the drawn groups that take the newest rollouts of a prompt which was just sampled; the others draw from all that is kept."""
    draw: Literal["reward", "uniform"] = "reward"
    """How rollouts of the others are drawn: likelier the higher their reward, or all alike."""
    inverse_temperature: float = Field(1.0, ge=0)
    """reward: a rollout's probability is proportional to exp(inverse_temperature * total reward)."""
    sync_every: int = Field(1, ge=1)
    """Updates between two times that the sampler gets the policy's weights."""
    max_staleness: int | None = Field(None, ge=0)
    """Rollouts older than this many updates are dropped. Unset: age does not matter."""
    prefill: int = Field(0, ge=0)
    """Rollouts that must be there before the first update."""
    filters: tuple[ReplayFilter, ...] = ()
    """What a rollout must have to be kept, for instance [{ reward = "safe", at_least = 1.0 }]."""


class SearchSettings(Settings):
    """Sampling in processes of its own, beside the trainer."""

    processes: int = Field(0, ge=0, le=64)
    """Searchers: each loads a copy of the model and samples while the trainer learns. 0: the trainer samples and learns in turn."""
    threads: int = Field(1, ge=1)
    """Threads of each searcher, on a CPU."""
    ahead: int = Field(2, ge=1)
    """Most steps' worth of requests under way at once: the trainer waits when there are more."""
    restarts: int = Field(3, ge=0)
    """How often a searcher that died is started again before the run gives up."""


class OptimSettings(Settings):
    """How the adapter is updated."""

    learning_rate: float = Field(2e-5, gt=0, le=1)
    """LoRA wants 1e-5 to 5e-5 on real models: at 1e-6 hardly a weight moves."""
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "auto"
    """adamw is torch's; the others are bitsandbytes'. auto: adamw, or adamw_8bit where adamw's state would take more than 2 % of the card."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is scaled down to this norm."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to 0 at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    critic_learning_rate: float | None = Field(None, gt=0, le=1)
    """Of the critic, where the algorithm has one. Unset: the same as learning_rate."""
    num_iterations: int = Field(1, ge=1, le=64)
    """Updates on each step's rollouts. Above 1, old log-probabilities are read first (one more forward pass)."""


class MemorySettings(Settings):
    """What the memory plan may use, and knobs that you would rather set yourself. Unset: the plan chooses."""

    card: str | None = None
    """"16GiB", or a card's name ("RTX 4080"); unset: what this machine has."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens (prompts and responses) of one forward and backward pass."""
    gradient_checkpointing: bool | None = None
    """Keep only each layer's input and compute the rest again in the backward pass."""
    head_chunk: int | None = Field(None, ge=1)
    """Tokens whose logits exist at the same time."""
    mlp_tile: int | None = Field(None, ge=0)
    """Tokens of one layer's MLP that are computed at a time, and again in the backward pass. 0: all at once."""
    offload: bool | None = None
    """Keep the layers' inputs, which checkpointing needs again, in the host's memory instead of the card's."""
    kv_cache: Literal["full", "int8"] | None = None
    """Keys and values while sampling: full precision, or 8 bits with a scale for every token and head (the sampler then differs slightly)."""
    embedding_on_host: bool | None = None
    """Keep the embedding in the host's memory, where it is not the output layer too."""
    probe: bool | None = None
    """Try the worst case (longest prompts and responses, largest wave) before the first step. Unset: on a GPU."""
    directions: Literal["auto", "float32", "bfloat16", "int8", "two_pass", "lagged"] = "auto"
    """How the gradients of several directions are kept, where the algorithm steers between them: whole, in blocks of 8 bits, or only their
    sketches (two_pass: a second backward pass applies the weights; lagged: the last step's weights apply). auto: what costs at most 10 % of the peak."""


class EvalSettings(Settings):
    """Held-out evaluation."""

    every: int = Field(0, ge=0)
    """Steps between two evaluations; there is always one before and one after. 0: only those."""
    num_generations: int = Field(4, ge=1)
    """Responses to each held-out prompt (pass@k up to this k)."""
    limit: int = Field(64, ge=0)
    """Most held-out prompts used. 0: no evaluation."""
    temperature: float = Field(1.0, ge=0, le=5)
    """0: greedy, one response."""


class ExportSettings(Settings):
    """The files that a finished run is exported to, and how they are proven."""

    gguf: Literal["auto", "required", "off"] = "auto"
    """Whether the result is meant for llama.cpp. auto: what no GGUF can hold is said before training; required: such a run is refused; off: nobody asks."""
    prompts: int = Field(64, ge=0)
    """Most held-out prompts on which a file's rewards are compared with the trained model's. 0: rewards are not compared."""
    shard_size: str = "48GB"
    """A model file above this size comes in parts, name-00001-of-0000N.gguf, of which llama.cpp is given the first: "2GiB", "500MiB"."""
    converter: str | None = None
    """llama.cpp's own converter, for models that this package cannot write: path of convert_hf_to_gguf.py, or of llama.cpp's sources. Unset: $LLAMA_CPP_DIR."""


class LogSettings(Settings):
    """The run folder."""

    dir: str | None = None
    """Where everything of this run goes; unset: runs/<name>-<number>."""
    save_steps: int = Field(25, ge=1)
    """Steps between two checkpoints."""
    save_total_limit: int = Field(3, ge=1)
    """Checkpoints kept, the newest ones."""
    completions: bool = True
    """Keep every step's completions with their rewards."""
