"""The least bytes that each part of a step has to move: inputs read once, outputs written once, weights once.

Every function returns (forward, backward) for one micro-batch, in bytes. `e` is the size of a number in the layers'
dtype; routers, statistics of losses, masters and moments are float32 or int64.

What the backward of a product y = x W^T reads and writes: the gradient of y, x and W, and the gradients of x and W.
An activation between two products is written by the one and read by the other, since the backward needs it.

Shapes: T tokens, H hidden, N heads, E experts, K top-k, R = T K rows, I width of an expert, V vocabulary.
"""

from dataclasses import dataclass

from anatomy_pieces import parts

from megatron_deepseek.model.architecture.config import ModelConfig

WIDE, INDEX = 4, 8  # bytes of a float32 and of an int64
Both = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """A micro-batch of `tokens` tokens of a model on one rank, `e` bytes a number."""

    model: ModelConfig
    tokens: int
    e: int

    @property
    def moe_layers(self) -> int:
        """Return how many layers have routed experts, MTP modules among them."""
        return sum(self.model.is_moe_layer(index) for index in range(self.layers))

    @property
    def layers(self) -> int:
        return self.model.num_hidden_layers + self.depths

    @property
    def depths(self) -> int:
        return self.model.num_nextn_predict_layers

    @property
    def predictions(self) -> int:
        return 1 + self.depths

    @property
    def rows(self) -> int:
        return self.tokens * self.model.num_experts_per_tok


def added(*terms: Both) -> Both:
    return sum(forward for forward, _ in terms), sum(backward for _, backward in terms)


def times(number: float, both: Both) -> Both:
    return number * both[0], number * both[1]


def product(rows: int, inputs: int, outputs: int, e: int, matrices: int = 1) -> Both:
    """y [rows, outputs] = x [rows, inputs] W^T, where the rows are divided among `matrices` of these weights."""
    x, y, w = rows * inputs, rows * outputs, matrices * inputs * outputs
    return e * (x + w + y), e * (y + x + w + x + w)


def swiglu(rows: int, width: int, e: int) -> Both:
    """silu(gate) up: two read and one written; back, three read and two written."""
    return e * 3 * rows * width, e * 5 * rows * width


def norm(rows: int, width: int, e: int) -> Both:
    """y = x / rms(x) w: x and w read, y written; back, x, w and y's gradient read, the gradients of x and w written."""
    return e * (2 * rows * width + width), e * (3 * rows * width + 2 * width)


def norms(s: Shape) -> Both:
    """Two of a layer and two of its latents; the last one; of an MTP module, those of its two inputs and its output."""
    m = s.model
    of_layer = added(times(2, norm(s.tokens, m.hidden_size, s.e)), norm(s.tokens, m.kv_lora_rank, s.e),
                     norm(s.tokens, m.q_lora_rank, s.e) if m.q_lora_rank else (0, 0))
    return added(times(s.layers, of_layer), times(1 + 3 * s.depths, norm(s.tokens, m.hidden_size, s.e)))


def projections(s: Shape) -> Both:
    """W_qa, W_qb, W_kva, W_kvb and W_o of each layer. The two that read x read it once."""
    m, heads = s.model, s.model.num_attention_heads
    down = (m.q_lora_rank or heads * m.qk_head_dim) + m.kv_lora_rank + m.qk_rope_head_dim
    up = (product(s.tokens, m.q_lora_rank, heads * m.qk_head_dim, s.e),) if m.q_lora_rank else ()
    return times(s.layers, added(
        product(s.tokens, m.hidden_size, down, s.e), *up,
        product(s.tokens, m.kv_lora_rank, heads * (m.qk_nope_head_dim + m.v_head_dim), s.e),
        product(s.tokens, heads * m.v_head_dim, m.hidden_size, s.e)))


def rope(s: Shape) -> Both:
    """The rotary dimensions of q turned in their place, both ways. k_pe turned and laid beside each head's k: k_nope
    and k_pe read, k written; back, k's gradient read, those of k_nope and k_pe written. v stays where it is.
    """
    m, heads = s.model, s.model.num_attention_heads
    turned = 2 * heads * m.qk_rope_head_dim
    keys = heads * m.qk_nope_head_dim + m.qk_rope_head_dim + heads * m.qk_head_dim
    both = s.layers * s.tokens * s.e * (turned + keys)
    return both, both


def attention(s: Shape) -> Both:
    """q, k and v read, y and the float32 log-sum-exp written; back, these and y's gradient read, three written."""
    m = s.model
    q, v = (s.tokens * m.num_attention_heads * width * s.e for width in (m.qk_head_dim, m.v_head_dim))
    lse = s.tokens * m.num_attention_heads * WIDE
    return times(s.layers, (2 * q + v + v + lse, 2 * q + v + v + lse + v + 2 * q + v))


def router(s: Shape) -> Both:
    """x in the layers' dtype and the float32 weight read, scores, choices and weights written; back, x, W, scores,
    choices and the weights' gradient read, the gradients of x and W written.
    """
    m, x = s.model, s.tokens * s.model.hidden_size * s.e
    w, scores = m.n_routed_experts * m.hidden_size * WIDE, s.tokens * m.n_routed_experts * WIDE
    forward = x + w + scores + s.rows * (INDEX + WIDE)
    return times(s.moe_layers, (forward, x + w + scores + s.rows * (INDEX + WIDE) + x + w))


def route(s: Shape) -> Both:
    """Choices read twice, to sort and to count; order, inverse and counts written."""
    return s.moe_layers * INDEX * (2 * s.rows + 2 * s.rows + s.model.n_routed_experts), 0


def dispatch(s: Shape) -> Both:
    """Tokens read and their copies written, with the order read; back, the copies' gradients read, a sum written."""
    rows, x = s.rows * s.model.hidden_size * s.e, s.tokens * s.model.hidden_size * s.e
    return times(s.moe_layers, (x + rows + s.rows * INDEX, rows + x + s.rows * INDEX))


def experts(s: Shape) -> Both:
    """Both products of all experts, and SwiGLU between them."""
    m = s.model
    return times(s.moe_layers, added(
        product(s.rows, m.hidden_size, 2 * m.moe_intermediate_size, s.e, m.n_routed_experts),
        swiglu(s.rows, m.moe_intermediate_size, s.e),
        product(s.rows, m.moe_intermediate_size, m.hidden_size, s.e, m.n_routed_experts)))


def combine(s: Shape) -> Both:
    """Rows, weights and places read, tokens written; back, those and the tokens' gradient read, the rows' and weights'
    gradients written.
    """
    rows, y = s.rows * s.model.hidden_size * s.e, s.tokens * s.model.hidden_size * s.e
    small = s.rows * (WIDE + INDEX)
    return times(s.moe_layers, (rows + small + y, rows + small + y + rows + s.rows * WIDE))


def balance(s: Shape) -> Both:
    """Scores and choices read; back, the scores' gradient written."""
    scores = s.tokens * s.model.n_routed_experts * WIDE
    return times(s.moe_layers, (scores + s.rows * INDEX, scores))


def mlps(s: Shape) -> Both:
    """The dense layers' SwiGLU block and the shared experts'. Gate and up read x once."""
    m, dense = s.model, s.layers - s.moe_layers

    def block(width: int) -> Both:
        return added(product(s.tokens, m.hidden_size, 2 * width, s.e), swiglu(s.tokens, width, s.e),
                     product(s.tokens, width, m.hidden_size, s.e))

    return added(times(dense, block(m.intermediate_size)),
                 times(s.moe_layers, block(m.moe_intermediate_size * (m.n_shared_experts or 0))))


def residual(s: Shape) -> Both:
    """Two sums of a layer, with shared experts one of three terms; their backward is the identity."""
    x = s.tokens * s.model.hidden_size * s.e
    return s.layers * 2 * 3 * x + s.moe_layers * bool(s.model.n_shared_experts) * x, 0


def gradient_sums(s: Shape) -> Both:
    """The gradients of what has two readers, added: of the stream at each norm, of a MoE layer's input, which router,
    dispatch and shared experts read, of what MTP modules share with the main model.
    """
    x = s.tokens * s.model.hidden_size * s.e
    more = s.moe_layers * (1 + bool(s.model.n_shared_experts)) + s.depths
    weights = s.depths * 2 * s.model.vocab_size * s.model.hidden_size * s.e
    return 0, 3 * x * (2 * s.layers + more) + 3 * weights


def embedding(s: Shape) -> Both:
    """Rows of the table read, x written; back, x's gradient read, the whole table's gradient written."""
    x, table = s.tokens * s.model.hidden_size * s.e, s.model.vocab_size * s.model.hidden_size * s.e
    return times(s.predictions, (2 * x + s.tokens * INDEX, x + s.tokens * INDEX + table))


def joining(s: Shape) -> Both:
    """An MTP module's product of the embedding and the state, side by side."""
    return times(s.depths, product(s.tokens, 2 * s.model.hidden_size, s.model.hidden_size, s.e))


def head(s: Shape) -> Both:
    return times(s.predictions, product(s.tokens, s.model.hidden_size, s.model.vocab_size, s.e))


def loss(s: Shape) -> Both:
    """Logits and labels read, a float32 loss of each token written; back, logits read and their gradient written."""
    logits = s.tokens * s.model.vocab_size * s.e
    return times(s.predictions, (logits + s.tokens * (INDEX + WIDE), 2 * logits + s.tokens * (INDEX + WIDE)))


OF_MICRO_BATCH = {
    parts.EMBEDDING: embedding, parts.NORMS: norms, parts.PROJECTIONS: projections, parts.ROPE: rope,
    parts.ATTENTION: attention, parts.ROUTER: router, parts.ROUTE: route, parts.BALANCE: balance,
    parts.DISPATCH: dispatch, parts.EXPERTS: experts, parts.COMBINE: combine, parts.MLPS: mlps,
    parts.RESIDUAL: residual, parts.JOINING: joining, parts.HEAD: head, parts.LOSS: loss,
    parts.ADDED: gradient_sums}


def gathered(parameters: int, e: int, micro_batches: int) -> Both:
    """Each step on one rank: masters read, weights in the layers' dtype written; nothing where they are the same."""
    return 0 if e == WIDE else (WIDE + e) * parameters, 0


def reduced(parameters: int, e: int, micro_batches: int) -> Both:
    """On one rank: each micro-batch's gradients read and added to float32 sums, which the first writes alone."""
    first, later = e + WIDE, e + 2 * WIDE
    if e == WIDE:
        first = 0  # autograd's gradient is the sum
    return 0, parameters * (first * bool(micro_batches > 1) + later * (micro_batches - 1))


def norm_and_clip(parameters: int, e: int, micro_batches: int) -> Both:
    """Gradients read; AdamW could scale them where it reads them."""
    return WIDE * parameters, 0


def adamw(parameters: int, e: int, micro_batches: int) -> Both:
    """Master, gradient and two moments read, master and moments written."""
    return 7 * WIDE * parameters, 0


OF_STEP = {parts.GATHERED: gathered, parts.REDUCED: reduced, parts.NORM_AND_CLIP: norm_and_clip, parts.ADAM: adamw}
