"""What a request says of streaming."""

from dataclasses import dataclass

from megatron_deepseek.serving.fields import Fields


@dataclass(frozen=True)
class StreamOptions:
    """What a stream shows beside text: usage in a last chunk of its own, and in every chunk (vLLM's addition)."""

    include_usage: bool
    continuous_usage: bool

    @classmethod
    def read(cls, fields: Fields) -> "StreamOptions | None":
        """Return the options of a streamed request, None of one that is not. Raise ApiError for what cannot be."""
        options = fields.object("stream_options")
        if not fields.boolean("stream"):
            if options.values:
                raise fields.fault("stream_options", "needs stream to be true")
            return None
        return cls(options.boolean("include_usage"), options.boolean("continuous_usage_stats"))
