"""The architecture of a model: one frozen dataclass, read from and written to Hugging Face's config.json.

Nothing about training or parallelism lives here: the same `ModelConfig` describes a checkpoint in any layout. Its
fields and what is said of each stand in fields.py, its parameters in parameters.py, of which the counts are sums.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture import hf_config, parameters
from megatron_deepseek.model.architecture.families import name_of, other_name
from megatron_deepseek.model.architecture.fields import ArchitectureFields
from megatron_deepseek.model.architecture.rope_scaling import RopeScaling


@dataclass(frozen=True)
class ModelConfig(ArchitectureFields):
    """An architecture of one of the families (families.py). Without routed experts every layer is dense.

    `scoring_func`: softmax (V2) or sigmoid (V3). `topk_method`: greedy, group_limited_greedy (V2) or noaux_tc (V3).
    `num_nextn_predict_layers`: depth of Multi-Token Prediction (V3 report, section 2.2).
    `reward_head`: one score a token in place of logits, as transformers' ...ForSequenceClassification with one label.
    `released_as`: another name of its family (families.py) that its config.json gives as model_type, such as kimi_k2.
    """

    released_as: str | None = None

    @property
    def model_type(self) -> str:
        """Return its name as config.json says it (families.py)."""
        return name_of(self, self.released_as)

    @classmethod
    def from_hf_dict(cls, fields: dict) -> "ModelConfig":
        """Read a parsed config.json of one of the families; see hf_config.py for the dialects."""
        released_as = other_name(fields.get("model_type"))
        fields = hf_config.normalise(fields) | hf_config.read_reward_head(fields)
        scaling = fields.pop("rope_scaling")
        return cls(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None, released_as=released_as)

    def to_hf_dict(self) -> dict:
        """Return the fields of a released config.json: DeepSeek's own code and transformers 4 and 5 read it."""
        return hf_config.released_fields(self) | {"model_type": self.model_type}

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read a config.json, or that of a directory."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        fields = dict(read_object(path).fields)
        try:
            return cls.from_hf_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def layer_parameters(self, index: int, active: bool = False) -> int:
        """Count the trained weights of layer `index`, or of an MTP module by its layer id.

        `active`: of the routed experts only a token's top k.
        """
        return parameters.layer_total(self, index, _active if active else _size)

    def mtp_parameters(self, active: bool = False) -> int:
        """Count one MTP module's own weights: its layer, eh_proj and three norms; embedding and head are the model's.
        """
        return self.layer_parameters(self.num_hidden_layers, active)

    def num_parameters(self) -> int:
        """Count all that are trained: the model's and its MTP modules', which share embedding and head with it."""
        return parameters.total(self, _size)

    def main_parameters(self) -> int:
        """Count the parameters of the model without its MTP modules, as the reports do (671B for V3)."""
        return parameters.total(self, _size, mtp=False)

    def num_active_parameters(self) -> int:
        """Count the parameters that one token is multiplied with, without MTP; the embedding, a look-up, is none."""
        return parameters.total(self, _active, mtp=False)

    def describe_parameters(self) -> str:
        """Return the count that every command tells: "4,215,008 parameters (504,544 of MTP), 1,777,152 active for a
        token".
        """
        mtp = self.num_parameters() - self.main_parameters()
        return (f"{self.num_parameters():,} parameters" + (f" ({mtp:,} of MTP)" if mtp else "")
                + f", {self.num_active_parameters():,} active for a token")


def _size(row: parameters.Parameter) -> int:
    return row.size if row.trained else 0


def _active(row: parameters.Parameter) -> int:
    return row.active
