"""Every way to generate, once: the rows of the table in docs/generation.md, of the tests, and of the benchmark that
runs PEFT through them."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from tests.hf.naive import Row as TokenRow
from tests.hf.naive import greedy, recomputing, row_logits
from tests.hf.tiny import VOCAB, model_of, tokenizer

STEPS = 4
LLAMA, MISTRAL, GEMMA = "Llama", "Mistral: a sliding window", "Gemma2: softcap, alternating windows"
Prompts = list[list[int]]  # negative ids are soft tokens
Answers = list[list[int]]
Way = Callable[[Any, Prompts], Answers]


@dataclass(frozen=True)
class NaiveRows:
    """The truth: everything recomputed, row by row, in eager attention."""

    model: Any
    soft: Any
    prompts: Prompts

    def greedy(self, steps: int = STEPS) -> Answers:
        return [greedy(self.model, self.soft, prompt, steps) for prompt in self.prompts]

    def generate(self, **options: Any) -> Answers:
        """transformers' `generate` over recomputed logits; its processors see the real tokens of each prompt."""
        shown = batch_of([[i for i in prompt if i >= 0] for prompt in self.prompts])
        torch.manual_seed(3)
        options = {"max_new_tokens": STEPS} | options
        sequences = recomputing(self.model, self.soft, self.prompts).generate(**shown, use_cache=False, **options)
        return sequences[:, shown["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def shortfall(self, answers: Answers) -> list[list[float]]:
        """How far each token's logit lies under the best one, in parts of the range of the logits."""
        found = []
        for ids, answer in zip(self.prompts, answers, strict=True):
            logits = row_logits(self.model, self.soft, TokenRow([*ids, *answer], len(ids)))[len(ids) - 1 : -1]
            best, least = logits.amax(-1), logits.amin(-1)
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            found.append(((best - chosen) / (best - least)).tolist())
        return found

    @torch.no_grad()
    def next(self, row: int, answer: list[int], prompt: int | None = None) -> list[int]:
        """The likeliest token after the prompt and after each token of an answer."""
        ids = self.prompts[row]
        logits = row_logits(self.model, self.soft, TokenRow([*ids, *answer], prompt or len(ids)))
        return logits[len(ids) - 1 :].argmax(-1).tolist()


@dataclass(frozen=True)
class GenerationRow:
    """One way to generate.

    Attributes:
        name: in the table.
        way: from a model (softkv's or PEFT's) and prompts to answers.
        truth: what the answers must be.
        excluded: why nobody gets an answer here, for the table; `error` is then what is raised.
        refused: methods that refuse this row: their name in tests/hf/tiny.py → what they say.
        texts: whether the prompts must be texts.
        model: in tests/hf/tiny.py.
        lossy: whether the cache rounds: every token must then be almost the likeliest.
        padding: whether the row is about padding.
        slow: run with a model of one layer, and three methods only.
    """

    name: str
    way: Way
    truth: Callable[[NaiveRows], Answers] = NaiveRows.greedy
    excluded: str = ""
    error: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    texts: bool = False
    model: str = LLAMA
    lossy: bool = False
    padding: bool = False
    slow: bool = False

    @property
    def changes(self) -> dict[str, Any]:
        """Of the model's configuration."""
        return {"num_hidden_layers": 1} if self.slow else {}

    def base(self) -> Any:
        """The frozen model, in eager attention."""
        return model_of(self.model, **self.changes)

    def right(self, answers: Answers, naive: NaiveRows) -> bool:
        """Whether the answers are the truth."""
        if self.lossy:
            return max(map(max, naive.shortfall(answers))) < 0.1
        return answers == self.truth(naive)


# Ways ----------------------------------------------------------------------------------------------------------------


def batch_of(prompts: Prompts, side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width).long(), torch.zeros(len(prompts), width).long()
    for r, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[r, place], mask[r, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def with_options(side: str = "left", steps: int = STEPS, **options: Any) -> Way:
    """`generate` of one batch."""

    def way(model: Any, prompts: Prompts) -> Answers:
        batch = batch_of(prompts, side)
        torch.manual_seed(3)
        output = model.generate(**batch, **{"max_new_tokens": steps} | options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        return sequences[:, batch["input_ids"].shape[1] :].tolist()

    return way


def row_by_row(**options: Any) -> Way:
    """`generate` of each row alone."""

    def way(model: Any, prompts: Prompts) -> Answers:
        return [with_options(**options)(model, [prompt])[0] for prompt in prompts]

    return way


def base_of(model: Any) -> Any:
    return model.base if hasattr(model, "soft") else model.get_base_model()


def with_its_base(model: Any, prompts: Prompts) -> Answers:
    return row_by_row(assistant_model=base_of(model))(model, prompts)


def early_exit(model: Any, prompts: Prompts) -> Answers:
    return row_by_row(assistant_early_exit=1)(model, prompts)


def with_a_draft(**options: Any) -> Way:
    def way(model: Any, prompts: Prompts) -> Answers:
        return row_by_row(assistant_model=model_of(LLAMA, num_hidden_layers=1), **options)(model, prompts)

    return way


def from_embeddings(model: Any, prompts: Prompts) -> Answers:
    batch = batch_of(prompts)
    embeds = base_of(model).get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    return model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=STEPS).tolist()


def own_cache(make: Callable[[Any], Any]) -> Way:
    def way(model: Any, prompts: Prompts) -> Answers:
        return with_options(past_key_values=make(model.config))(model, prompts)

    return way


def scores(model: Any, prompts: Prompts) -> Answers:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(**batch_of(prompts), max_new_tokens=STEPS, **options)
    found = [torch.stack(part, 1).argmax(-1).tolist() for part in (output.scores, output.logits)]
    assert found[0] == found[1]
    return found[0]


def manual(side: str, make_cache: Callable[[Any], Any] = lambda config: None) -> Way:
    """Token by token through `forward`."""

    def way(model: Any, prompts: Prompts) -> Answers:
        batch, cache, got = batch_of(prompts, side), make_cache(model.config), []
        ids, mask = batch["input_ids"], batch["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        for _ in range(STEPS):
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            from_the_end = last - ids.shape[1]  # PEFT's logits have a column for each soft token in front
            ids = output.logits[torch.arange(len(last)), from_the_end].argmax(-1, keepdim=True)
            last = torch.zeros_like(last)
            got.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        return torch.cat(got, 1).tolist()

    return torch.no_grad()(way)


FED = [11, 12, 13]


class _Prefilled:
    """A batch's cache, and forwards against it."""

    def __init__(self, model: Any, prompts: Prompts) -> None:
        batch = batch_of(prompts)
        self.model, self.mask = model, batch["attention_mask"]
        output = model(**batch, use_cache=True)
        self.cache, self.first = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def feed(self, ids: list[int]) -> Tensor:
        """What the model says after each of the tokens given to every row."""
        new = torch.tensor([ids] * len(self.mask))
        self.mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        output = self.model(new, attention_mask=self.mask, past_key_values=self.cache)
        return output.logits[:, -len(ids) :].argmax(-1)

    def rows(self, index: list[int]) -> None:
        self.mask = self.mask[index]


@torch.no_grad()
def several_at_once(model: Any, prompts: Prompts) -> Answers:
    state = _Prefilled(model, prompts)
    return torch.cat([state.first, state.feed(FED)], 1).tolist()


@torch.no_grad()
def cropped(model: Any, prompts: Prompts) -> Answers:
    state = _Prefilled(model, prompts)
    state.feed([20, 21, 22])
    state.cache.crop(-3)
    state.mask = state.mask[:, :-3]
    return torch.cat([state.first, state.feed(FED)], 1).tolist()


ORDER = [2, 0, 0, 1]


@torch.no_grad()
def reordered(model: Any, prompts: Prompts) -> Answers:
    state = _Prefilled(model, prompts)
    state.feed(FED[:1])
    state.cache.reorder_cache(torch.tensor(ORDER))
    state.rows(ORDER)
    return state.feed(FED[1:]).tolist()


@torch.no_grad()
def chosen_and_repeated(model: Any, prompts: Prompts) -> Answers:
    state = _Prefilled(model, prompts)
    state.cache = copy.deepcopy(state.cache)
    state.cache.batch_select_indices(torch.tensor([2, 0]))
    state.cache.batch_repeat_interleave(2)
    state.rows([2, 2, 0, 0])
    return state.feed(FED).tolist()


def continued(model: Any, prompts: Prompts) -> Answers:
    """Each row: a first answer, then more from its cache after three new tokens."""
    got = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        first = model.generate(input_ids=ids, max_new_tokens=STEPS, return_dict_in_generate=True)
        longer = torch.cat([ids, first.sequences[:, ids.shape[1] :], torch.tensor([FED])], 1)
        output = model.generate(input_ids=longer, max_new_tokens=STEPS, past_key_values=first.past_key_values)
        got.append(output[0, longer.shape[1] :].tolist())
    return got


def continued_truth(naive: NaiveRows) -> Answers:
    got = []
    for prompt, answer in zip(naive.prompts, naive.greedy(), strict=True):
        row = TokenRow([*prompt, *answer, *FED], len(prompt))  # an encoder has read the first prompt
        for _ in range(STEPS):
            token = int(row_logits(naive.model, naive.soft, row)[-1].argmax())
            row = TokenRow([*row.ids, token], row.prompt)
        got.append(row.ids[-STEPS:])
    return got


def compiled(model: Any, prompts: Prompts) -> Answers:
    """transformers compiles the base's forward for static caches; on a CPU when told to."""
    torch.compiler.reset()
    config = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    got = with_options(cache_implementation="static", compile_config=config)(model, prompts)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    return got


def continuous_batching(model: Any, prompts: Prompts) -> Answers:
    config = transformers.GenerationConfig(max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=16, max_batch_tokens=64, max_requests_per_batch=4
    )
    outputs = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=small)
    if not outputs:
        raise RuntimeError("generate_batch returned no answers")
    return [outputs[key].generated_tokens for key in sorted(outputs, key=lambda key: int(key.split("_")[-1]))]


def ids_of(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def text_of(prompt: list[int]) -> str:
    return tokenizer().decode(prompt, skip_special_tokens=True)


def text_streamer(model: Any, prompts: Prompts) -> Answers:
    class Kept(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            kept.append(text)

    got = []
    for prompt in prompts:
        kept: list[str] = []
        with_options(streamer=Kept(tokenizer(), skip_prompt=True))(model, [prompt])
        got.append(ids_of("".join(kept)))
    return got


def iterator_streamer(model: Any, prompts: Prompts) -> Answers:
    got = []
    for prompt in prompts:
        streamer = transformers.TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=9)
        with_options(streamer=streamer)(model, [prompt])
        got.append(ids_of("".join(streamer)))
    return got


CHAT = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}"


def chat(model: Any, prompts: Prompts) -> Answers:
    """Each prompt is a conversation of two messages."""
    conversations = [
        [{"role": "system", "content": text_of(prompt[:2])}, {"role": "user", "content": text_of(prompt[2:])}]
        for prompt in prompts
    ]
    batch = tokenizer().apply_chat_template(
        conversations,
        chat_template=CHAT,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    batch.pop("token_type_ids", None)
    sequences = model.generate(**batch, max_new_tokens=STEPS)
    return sequences[:, batch["input_ids"].shape[1] :].tolist()


def pipeline(model: Any, prompts: Prompts) -> Answers:
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    texts = [text_of(prompt) for prompt in prompts]
    found = pipe(texts, max_new_tokens=STEPS, batch_size=2, return_full_text=False, do_sample=False)
    return [ids_of(answer[0]["generated_text"]) for answer in found]


def with_stop_strings() -> dict[str, Any]:
    """Words that end an answer; transformers wants a tokenizer that can hold the letters "abcdef"."""
    backend = json.loads(tokenizer().backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary["abcdef"] = vocabulary.pop(f"w{VOCAB - 1}")
    reader = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    return {"stop_strings": [f"w{i}" for i in range(20, 40)], "tokenizer": reader}


def guided(model: Any, prompts: Prompts) -> Answers:
    return with_options(guidance_scale=1.8)(model, prompts)


@torch.no_grad()
def guided_truth(naive: NaiveRows) -> Answers:
    """Classifier-free guidance: the unconditional prompt is the last token, under the same soft prompt."""
    got = []
    for prompt in naive.prompts:
        last = [i for i in prompt if i >= 0][-1]
        answer: list[int] = []
        for _ in range(STEPS):
            given, bare = (
                row_logits(naive.model, naive.soft, TokenRow([*ids, *answer], len(ids)))[-1].log_softmax(-1)
                for ids in (prompt, [last])
            )
            answer.append(int((1.8 * (given - bare) + bare).argmax()))
        got.append(answer)
    return got


def every_other_token(batch: int, ids: Tensor) -> list[int]:
    """Only tokens of the other parity than the last, and none that the row holds."""
    held = set(ids.tolist())
    return [i for i in range(2, VOCAB) if (i - int(ids[-1])) % 2 and i not in held]


class FewerThanSeen(transformers.LogitsProcessor):
    """A user's processor that counts the columns it is shown."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        real = (input_ids != 0).sum(1)
        return scores.index_fill(1, torch.arange(int(real.min())), -1e9)


def own_processor(model: Any, prompts: Prompts) -> Answers:
    return with_options(logits_processor=[FewerThanSeen()])(model, prompts)


class SeenEnough(transformers.StoppingCriteria):
    """A user's criterion: enough even tokens in the row."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ((input_ids % 2 == 0) & (input_ids > 0)).sum(1) >= 6


def custom_loop(model: Any, input_ids: Tensor, generation_config: Any, **options: Any) -> Tensor:
    """A user's decoding method: greedy, in their own words."""
    options.pop("stopping_criteria"), options.pop("logits_processor")
    options = {name: options[name] for name in ("attention_mask", "position_ids", "past_key_values")}
    for step in range(STEPS):
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1 if step else None, is_first_iteration=not step, **options
        )
        output = model(**inputs)
        options = model._update_model_kwargs_for_generation(output, options)
        input_ids = torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], 1)
    return input_ids


def searched(**options: Any) -> dict[str, Any]:
    """Way and truth of a search."""
    plain = {key: value for key, value in options.items() if key not in ("cache_implementation", "use_cache")}
    return {"way": with_options(**options), "truth": lambda naive: naive.generate(**plain)}


def needs_remote_code(**options: Any) -> dict[str, Any]:
    return {
        "way": with_options(**options),
        "excluded": "transformers takes it from the hub and needs `trust_remote_code=True`",
        "error": "requires `trust_remote_code=True`",
    }


WHOLE_PROMPTS = {"p-tuning v2 encoder": "reads whole prompts at once"}

ROWS = [
    GenerationRow("greedy, left padding", with_options(), padding=True),
    GenerationRow("greedy, right padding", with_options("right"), padding=True),
    GenerationRow("dynamic cache", with_options(cache_implementation="dynamic")),
    GenerationRow("a cache object of the user's", own_cache(lambda config: transformers.DynamicCache())),
    GenerationRow("static cache", with_options(cache_implementation="static")),
    GenerationRow(
        "a static cache object of the user's",
        own_cache(lambda config: transformers.StaticCache(config=config, max_cache_len=32)),
    ),
    GenerationRow("sliding windows, dynamic cache", with_options(), model=MISTRAL),
    GenerationRow("sliding windows, static cache", with_options(cache_implementation="static"), model=MISTRAL),
    GenerationRow("alternating windows, static cache", with_options(cache_implementation="static"), model=GEMMA),
    GenerationRow("no cache", with_options(use_cache=False)),
    GenerationRow(
        "quantised cache, fp8",
        with_options(cache_implementation="quantized", cache_config={"backend": "fp8"}),
        lossy=True,
    ),
    GenerationRow(
        "quantised cache, quanto",
        with_options(cache_implementation="quantized", cache_config={"backend": "quanto"}),
        excluded="needs optimum-quanto",
        error="quanto",
        lossy=True,
    ),
    GenerationRow(
        "quantised cache, HQQ",
        with_options(cache_implementation="quantized", cache_config={"backend": "hqq"}),
        excluded="needs hqq",
        error="(?i)hqq",
        lossy=True,
    ),
    GenerationRow(
        "offloaded cache", with_options(cache_implementation="offloaded"), excluded="needs CUDA", error="CUDA"
    ),
    GenerationRow(
        "offloaded static cache",
        with_options(cache_implementation="offloaded_static"),
        excluded="needs CUDA",
        error="CUDA",
    ),
    GenerationRow("chunked prefill", with_options(prefill_chunk_size=2), refused=WHOLE_PROMPTS),
    GenerationRow(
        "chunked prefill into a static cache",
        with_options(prefill_chunk_size=2, cache_implementation="static"),
        refused=WHOLE_PROMPTS,
    ),
    GenerationRow("compiled decoding, static cache, full graph", compiled, slow=True),
    GenerationRow("sampling", **searched(do_sample=True, temperature=1.3, top_k=20, top_p=0.9)),
    GenerationRow(
        "sampling: min_p, typical_p, epsilon and eta cutoffs",
        **searched(do_sample=True, min_p=0.01, typical_p=0.9, epsilon_cutoff=3e-4, eta_cutoff=3e-4),
    ),
    GenerationRow("several sequences a row", **searched(do_sample=True, num_return_sequences=3)),
    GenerationRow("beam search", **searched(num_beams=3)),
    GenerationRow(
        "beam search, all beams, an end token",
        **searched(num_beams=3, num_return_sequences=3, eos_token_id=list(range(2, 12)), length_penalty=0.5),
    ),
    GenerationRow("beam search, static cache", **searched(num_beams=3, cache_implementation="static")),
    GenerationRow("beam search, no cache", **searched(num_beams=3, use_cache=False)),
    GenerationRow("beam search, sliding windows", **searched(num_beams=3), model=MISTRAL),
    GenerationRow("beam sampling", **searched(num_beams=2, do_sample=True)),
    GenerationRow("group beam search", **needs_remote_code(num_beams=2, num_beam_groups=2, diversity_penalty=1.0)),
    GenerationRow("constrained beam search", **needs_remote_code(num_beams=2, force_words_ids=[[5]])),
    GenerationRow("contrastive search", **needs_remote_code(penalty_alpha=0.6, top_k=4)),
    GenerationRow("DoLa", **needs_remote_code(dola_layers="low")),
    GenerationRow("prompt lookup", row_by_row(prompt_lookup_num_tokens=3)),
    GenerationRow("prompt lookup, sliding windows", row_by_row(prompt_lookup_num_tokens=3), model=MISTRAL),
    GenerationRow("an assistant model", with_a_draft()),
    GenerationRow("an assistant model, sampling", with_a_draft(do_sample=True, top_k=1)),
    GenerationRow("its own base as assistant", with_its_base),
    GenerationRow("early exit as assistant", early_exit),
    GenerationRow("`inputs_embeds`", from_embeddings, texts=True),
    GenerationRow("scores and logits", scores),
    GenerationRow("manual decoding, left padding", manual("left"), padding=True),
    GenerationRow("manual decoding, right padding", manual("right"), padding=True),
    GenerationRow("manual decoding, right padding, sliding windows", manual("right"), model=MISTRAL, padding=True),
    GenerationRow(
        "manual decoding, static cache",
        manual("left", lambda config: transformers.StaticCache(config=config, max_cache_len=32)),
    ),
    GenerationRow(
        "several tokens at once against a cache",
        several_at_once,
        lambda naive: [naive.next(r, FED) for r in range(len(naive.prompts))],
    ),
    GenerationRow("a cropped cache", cropped, lambda naive: [naive.next(r, FED) for r in range(len(naive.prompts))]),
    GenerationRow("a reordered cache", reordered, lambda naive: [naive.next(r, FED)[2:] for r in ORDER]),
    GenerationRow(
        "a copied cache, rows chosen and repeated",
        chosen_and_repeated,
        lambda naive: [naive.next(r, FED)[1:] for r in (2, 2, 0, 0)],
    ),
    GenerationRow(
        "several turns from one cache",
        continued,
        continued_truth,
        refused={"prompt-tuning after": "expects an empty cache"},
    ),
    GenerationRow(
        "continuous batching",
        continuous_batching,
        excluded="supports only transformers' own attention, which takes no prefix",
        error="continuous batching supports only transformers' own attention",
    ),
    GenerationRow("`TextStreamer`", text_streamer),
    GenerationRow("`TextIteratorStreamer`", iterator_streamer),
    GenerationRow("a chat template", chat, texts=True),
    GenerationRow('`pipeline("text-generation")`', pipeline, texts=True),
    GenerationRow("an end token, rows finish apart", **searched(eos_token_id=list(range(2, 20)))),
    GenerationRow(
        "least length, forced end",
        **searched(max_new_tokens=5, min_new_tokens=3, eos_token_id=list(range(2, 20)), forced_eos_token_id=7),
    ),
    GenerationRow("stop strings", **searched(**with_stop_strings())),
    GenerationRow("a stopping criterion of the user's", **searched(stopping_criteria=[SeenEnough()])),
    GenerationRow("repetition penalty", **searched(repetition_penalty=1.7)),
    GenerationRow("no repeated n-grams", **searched(no_repeat_ngram_size=2)),
    GenerationRow(
        "prompt's n-grams and tokens penalised",
        **searched(encoder_no_repeat_ngram_size=1, encoder_repetition_penalty=1.5),
    ),
    GenerationRow(
        "bad words, biases, suppressed tokens",
        **searched(
            bad_words_ids=[[9, 10], [11]], sequence_bias=[[[5], 2.0]], suppress_tokens=[12], begin_suppress_tokens=[13]
        ),
    ),
    GenerationRow("allowed tokens by function", **searched(prefix_allowed_tokens_fn=every_other_token)),
    GenerationRow(
        "a logits processor of the user's",
        own_processor,
        lambda naive: naive.generate(logits_processor=[FewerThanSeen()]),
    ),
    GenerationRow(
        "watermark", **searched(watermarking_config={"bias": 3.0, "seeding_scheme": "selfhash", "context_width": 2})
    ),
    GenerationRow("classifier-free guidance", guided, guided_truth),
    GenerationRow("a decoding loop of the user's (`custom_generate`)", with_options(custom_generate=custom_loop)),
]


def told(row: GenerationRow) -> str:
    """softkv's result, in the table; the tests hold it to that."""
    if row.excluded:
        return f"excluded: {row.excluded}"
    refused = [f"{method}: refused, “{words}”" for method, words in row.refused.items()]
    return "; ".join(["right", *refused])
