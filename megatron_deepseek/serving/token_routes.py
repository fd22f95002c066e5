"""/tokenize and /detokenize, with vLLM's fields."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from megatron_deepseek.inference.text import prompt_ids
from megatron_deepseek.serving.body import read_request
from megatron_deepseek.serving.chat_request import ask_in_form
from megatron_deepseek.serving.errors import ApiError
from megatron_deepseek.serving.fields import Fields
from megatron_deepseek.serving.responses import Json
from megatron_deepseek.serving.service import Service


class TokenRoutes:
    """What is done with texts and ids, without the model."""

    def __init__(self, service: Service):
        self.service = service

    @property
    def routes(self) -> list[Route]:
        return [Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/detokenize", self.detokenize, methods=["POST"])]

    async def tokenize(self, request: Request) -> Response:
        """Return the ids of a prompt's text, or of messages as the model is asked with them."""
        return Json(await read_request(request, self.service.limits, self._tokenized))

    async def detokenize(self, request: Request) -> Response:
        """Return the text of ids."""
        return Json(await read_request(request, self.service.limits, self._detokenized))

    def _tokenized(self, body: dict) -> dict:
        fields = self._fields(body)
        ids = self._ids(fields)
        words = [self.service.tokens.text_of(each) for each in ids] if fields.boolean("return_token_strs") else None
        return {"count": len(ids), "max_model_len": self.service.model.defaults.max_model_len, "tokens": ids,
                "token_strs": words}

    def _ids(self, fields: Fields) -> list[int]:
        if fields.given("messages") is not None:
            if self.service.chat is None:
                raise ApiError(400, "The model's tokenizer has no chat template", "messages")
            return list(ask_in_form(self.service.chat, dict(fields.values)).prompt)
        text = fields.text("prompt")
        if text is None:
            raise fields.fault("prompt", "is missing, and so is messages")
        if fields.boolean("add_special_tokens", True):
            return prompt_ids(self.service.tokenizer, text)
        return self.service.tokenizer.encode(text)

    def _detokenized(self, body: dict) -> dict:
        fields = self._fields(body)
        ids = fields.listed("tokens")
        if ids is None:
            raise fields.fault("tokens", "is missing")
        known = self.service.tokenizer.vocab_size
        for place, each in enumerate(ids):
            if type(each) is not int or not 0 <= each < known:
                raise fields.fault(f"tokens[{place}]", f"is no token id from 0 to {known - 1}")
        return {"prompt": self.service.tokenizer.decode(ids)}

    def _fields(self, body: dict) -> Fields:
        fields = Fields(body)
        self.service.model.check_name(fields.text("model"))
        if self.service.tokenizer is None:
            raise ApiError(400, "The model was loaded without a tokenizer")
        return fields
