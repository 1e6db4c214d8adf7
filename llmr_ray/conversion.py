"""Model files of other formats as folders that transformers loads and trains: GGUF for LLMs, ONNX for encoders.

Runs as ``python -m llmr_ray.conversion MODEL.gguf FOLDER`` or ``... MODEL.onnx LIKE FOLDER``, a process of its own, so
that who fetches an asset (llmr_ray/assets.py) neither imports torch nor keeps the model's memory.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmr_ray.errors import ResourceError

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-5
"""How far embeddings of unit norm may be from those of the ONNX graph. float32 leaves 1e-7, a wrong layer 1e-2."""

_PARAMETER = re.compile(r"(?:^|\.)((?:embeddings|encoder\.layer)\..+)$")
"""The name that a parameter has in a BertModel, behind those of the modules that held it when it was exported."""


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF language model as a transformers folder (bfloat16 safetensors and tokenizer).

    GGUF is a quantization method to transformers: a model loaded from it refuses to be saved until its traces are
    removed, even when the weights were dequantized.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def convert_onnx(source: Path, like: Path, folder: Path) -> None:
    """Writes a BERT encoder of an ONNX file (float32, mean pooling) as a folder like that of another model.

    What the graph does not name (heads, activation, tokenizer, pooling) is taken from `like`, and the written model's
    embeddings of made-up texts are compared with those that the graph itself computes. The folder is determined by the
    two models alone, to the byte. It has no pooler, which no embedding uses.

    Args:
        source: a graph of input_ids and attention_mask (int64 [B, L]) that gives embeddings (float32 [B, D]).
        like: a model folder of the same family: same width, heads and vocabulary; any number of layers.
        folder: where files are written to; created if missing.

    Raises:
        ResourceError: the file holds something else than such an encoder, or the written model computes something
            else than the graph.
    """
    import onnx
    from safetensors.numpy import save_file

    from llmr_ray.modeling.text_model import readable_weights

    # Weights kept in other files would be read from wherever the graph says.
    model = onnx.load(source, load_external_data=False)
    parameters = bert_parameters(model.graph, source)
    config = json.loads((like / "config.json").read_text())
    config.pop("_name_or_path", None)
    config["num_hidden_layers"] = len({name.split(".")[2] for name in parameters if name.startswith("encoder.layer.")})
    _require_all(parameters, config, source, like)
    shutil.copytree(
        like,
        folder,
        ignore=shutil.ignore_patterns("*.safetensors", "README*", "data_config*", ".*"),
        dirs_exist_ok=True,
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})
    readable_weights(folder)
    _require_same_embeddings(model, source, folder, like, config["vocab_size"])


def bert_parameters(graph: "onnx.GraphProto", source: Path) -> dict[str, np.ndarray]:
    """The parameters of a BertModel by their names in it: float32, as torch has them.

    An exporter keeps the names of most, but the weights of linear layers become the right-hand side of products:
    transposed, and numbered ("onnx::MatMul_470"). Which layer such a weight belongs to is told by the bias that the
    graph adds to its product.

    Raises:
        ResourceError: a weight is no float32, lies in another file, or belongs to no layer that can be told.
    """
    from onnx import TensorProto, numpy_helper

    held, numbered, found = {}, {}, {}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.data_location == TensorProto.EXTERNAL:
            kind = TensorProto.DataType.Name(tensor.data_type)
            where = "in another file" if tensor.data_location == TensorProto.EXTERNAL else "in it"
            raise ResourceError(
                f"{source} has the weight '{tensor.name}' as {kind} {where}; only FLOAT in the file itself becomes a "
                "model that trains as the original does. Use an export in float32 of one file."
            )
        value = held[tensor.name] = numpy_helper.to_array(tensor)
        if named := _PARAMETER.search(tensor.name):
            found[named[1]] = value
        else:
            numbered[tensor.name] = value
    for product in graph.node:
        if product.op_type != "MatMul" or product.input[1] not in numbered:
            continue
        sums = [node for node in graph.node if node.op_type == "Add" and product.output[0] in node.input]
        added = [name for node in sums for name in node.input if name in held and name.endswith(".bias")]
        layer = _PARAMETER.search(added[0]) if len(added) == 1 else None
        if layer is None:
            raise ResourceError(
                f"{source} multiplies by '{product.input[1]}' and adds {added} to the product; which layer of a BERT "
                "that is would be a guess, and a wrong one gives a model of noise. Use an export whose biases keep "
                "their names (torch.onnx.export of a BertModel)."
            )
        found[layer[1].removesuffix("bias") + "weight"] = np.ascontiguousarray(numbered.pop(product.input[1]).T)
    if numbered:
        raise ResourceError(
            f"{source} holds weights that no layer of a BERT has: {sorted(numbered)[:5]}. A model without them would "
            "compute something else. Only plain BERT encoders can be converted."
        )
    return found


def _require_all(parameters: dict[str, np.ndarray], config: dict[str, Any], source: Path, like: Path) -> None:
    """Raises ResourceError unless these are the parameters of a BertModel so configured, no more and no less."""
    import torch
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig.from_dict(config), add_pooling_layer=False)
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name: value.shape for name, value in parameters.items()}
    if shapes != needed:
        differing = sorted(name for name in needed | shapes if needed.get(name) != shapes.get(name))
        told = [f"{name} is {shapes.get(name, 'missing')}, not {needed.get(name, 'there')}" for name in differing[:5]]
        raise ResourceError(
            f"{source} is no BERT with the configuration of {like} and {config['num_hidden_layers']} layers: "
            f"{'; '.join(told)} ({len(differing)} in all). What is missing would be random. Give a folder of its own "
            "family to convert it like."
        )


def _require_same_embeddings(model: "onnx.ModelProto", source: Path, folder: Path, like: Path, num_tokens: int) -> None:
    """Raises ResourceError unless the model in `folder` gives texts the embeddings that the ONNX graph gives them."""
    from onnx.reference import ReferenceEvaluator

    from llmr_ray.modeling.embedder import Embedder

    lengths = [12, 7]
    ids_BL = np.arange(1, 1 + 2 * max(lengths), dtype=np.int64).reshape(2, -1) * 7919 % num_tokens
    mask_BL = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
    if (names := sorted(value.name for value in model.graph.input)) != sorted(inputs):
        raise ResourceError(
            f"{source} takes {names}, but only graphs of input_ids and attention_mask can be run, to compare the "
            "converted model with. Export the encoder with these two."
        )
    embedder = Embedder(folder, max_query_tokens=12, max_document_tokens=12, precision="float32", device="cpu")
    shape = (len(lengths), embedder.dimension)
    told = [value for value in ReferenceEvaluator(model).run(None, inputs) if np.shape(value) == shape]
    if len(told) != 1:
        raise ResourceError(
            f"{source} has {len(told)} outputs of shape {shape} for {len(lengths)} texts, where one, their embeddings, "
            "is needed to compare the converted model with. Export the encoder with its pooling."
        )
    theirs_BD = told[0] / np.linalg.norm(told[0], axis=1, keepdims=True)
    tokens = [row[:length] for row, length in zip(ids_BL, lengths, strict=True)]
    ours_BD = embedder.infer(tokens, 64, np.empty(shape, dtype=np.float32))
    if not (difference := float(np.abs(ours_BD - theirs_BD).max())) < TOLERANCE:
        raise ResourceError(
            f"{source}: the converted model's embeddings differ from those of the graph by {difference:.1e} (unit "
            f"norm; {TOLERANCE:.0e} is allowed): it is another model. Heads, activation and pooling were those of "
            f"{like}; give a folder of its own family to convert it like."
        )


def _main(paths: list[Path]) -> None:
    try:
        if len(paths) == 2 and paths[0].suffix == ".gguf":
            convert_gguf(*paths)
        elif len(paths) == 3 and paths[0].suffix == ".onnx":
            convert_onnx(*paths)
        else:
            sys.exit("usage: python -m llmr_ray.conversion MODEL.gguf FOLDER | MODEL.onnx LIKE FOLDER")
    except ResourceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main([Path(argument) for argument in sys.argv[1:]])
