"""ComfyUI's ``prompt`` JSON: the graph that was run, walked from the saved picture back to the model.

A graph is ``{id: {"class_type": name, "inputs": {...}}}``; an input is a value, or ``[id, slot]`` of the node it
comes from. Graphs can do anything; what is understood here is what txt2img, img2img and base → refiner graphs are made
of. Every other node on the way is a remark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_cli.generation.foreign import Foreign, base_name
from sdxl_cli.generation.metadata import ModelRecord

_SAVES = ("SaveImage", "Image Save", "SaveImageWebsocket", "SaveAnimatedWEBP", "PreviewImage")
"""Nodes that end a graph, the likeliest first."""
_SAMPLERS = ("KSampler", "KSamplerAdvanced")
_TEXT_INPUTS = ("text", "string", "value", "prompt", "String", "text_positive")


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph."""

    id: str
    kind: str
    inputs: Mapping[str, Any]

    def __str__(self) -> str:
        return f"node {self.id} ({self.kind})"


class Graph:
    """Nodes and the way between them."""

    def __init__(self, text: str) -> None:
        """Raises ValueError when ``text`` is no graph."""
        table = json.loads(text)
        self.nodes = {
            str(key): Node(str(key), str(node["class_type"]), node.get("inputs", {}))
            for key, node in table.items()
            if isinstance(node, dict) and "class_type" in node
        }
        if not self.nodes:
            raise ValueError("no nodes")

    def source(self, node: Node, name: str) -> Node | None:
        """The node an input comes from; None when it is a value, or missing."""
        link = node.inputs.get(name)
        if isinstance(link, list) and len(link) == 2:
            return self.nodes.get(str(link[0]))
        return None

    def value(self, node: Node, name: str) -> Any:
        """An input's value, through nodes that only hold one; None when it is computed or missing."""
        for _ in range(len(self.nodes)):
            found = node.inputs.get(name)
            origin = self.source(node, name)
            if origin is None:
                return None if isinstance(found, list) else found
            names = [key for key in (*_TEXT_INPUTS, name) if key in origin.inputs]
            if not names:
                return None
            node, name = origin, names[0]
        return None

    def upstream(self, node: Node) -> Iterator[Node]:
        """The node and everything it comes from, the nearest first; every node once."""
        waiting, seen = [node], {node.id}
        while waiting:
            here = waiting.pop(0)
            yield here
            for name in here.inputs:
                origin = self.source(here, name)
                if origin is not None and origin.id not in seen:
                    seen.add(origin.id)
                    waiting.append(origin)


def read(text: str) -> Foreign:
    """A graph as a request.

    Raises:
        ValueError: ``text`` is no graph.
    """
    graph, found = Graph(text), Foreign("ComfyUI")
    end = next((n for kind in _SAVES for n in graph.nodes.values() if n.kind == kind), None)
    reach = list(graph.upstream(end)) if end is not None else list(graph.nodes.values())
    samplers = [node for node in reach if node.kind in _SAMPLERS]
    if not samplers:
        kinds = ", ".join(sorted({node.kind for node in reach}))
        found.remarks.append(f"no sampler that is known here is in the graph ({kinds})")
        return found
    reader = _Reader(graph, found)
    reader.read(samplers)
    for node in reach:
        if node.id not in reader.understood and node is not end:
            found.remarks.append(f"{node}: has no counterpart here")
    return found


class _Reader:
    """Fills a :class:`Foreign` from the nodes of a graph, and remembers which it understood."""

    def __init__(self, graph: Graph, found: Foreign) -> None:
        self.graph, self.found = graph, found
        self.understood: set[str] = set()

    def read(self, samplers: list[Node]) -> None:
        """The settings of the sampler that starts from noise, and of a refiner after it."""
        # the nearest to the picture comes first, the one that starts comes last
        first, later = samplers[-1], samplers[:-1]
        self._sampler(first)
        for node in later:
            self._after(node, first)
        for node in self.graph.nodes.values():
            if node.kind == "VAEDecode":
                self._vae(node)
        self.found.put("prompt_syntax", "comfy", "ComfyUI's weights")

    def _sampler(self, node: Node) -> None:
        take, self.understood = self._take, self.understood | {node.id}
        take(node, "seed", "seed")
        take(node, "noise_seed", "seed")
        take(node, "steps", "steps")
        take(node, "cfg", "cfg_scale")
        if isinstance(name := self.graph.value(node, "sampler_name"), str):
            self.found.put_sampler(name, f"{node}: sampler_name {name}")
        if isinstance(name := self.graph.value(node, "scheduler"), str):
            self.found.put_scheduler(name, f"{node}: scheduler {name}")
        self._latent(node)
        self._model(node, "base")
        self._prompt(node, "positive", "prompt")
        self._prompt(node, "negative", "negative_prompt")
        if self.found.fields.get("negative_prompt") == "":
            self.found.put("empty_negative", "encode", "the empty negative prompt, which ComfyUI encodes")

    def _after(self, node: Node, first: Node) -> None:
        """A second sampler: a refiner that goes on, or another pass."""
        names = [self._checkpoint(one) for one in (node, first)]
        start, steps = (self.graph.value(node, name) for name in ("start_at_step", "steps"))
        if node.kind == "KSamplerAdvanced" and names[0] not in (None, names[1]) and start and steps:
            self.understood.add(node.id)
            self._model(node, "refiner")
            self._mark(node, "positive")
            self._mark(node, "negative")
            self.found.put("refiner_switch_at", float(start) / float(steps), f"{node}: start_at_step {start}")
            self.found.remarks.append(
                f"{node}: changes to the refiner after step {start} of {steps}; here it changes at that share of "
                "the noise levels"
            )
        else:
            self.found.remarks.append(f"{node}: a second pass over the picture has to be asked for by flags")
            self.understood.add(node.id)

    def _latent(self, node: Node) -> None:
        origin = self.graph.source(node, "latent_image")
        if origin is None:
            return
        if origin.kind in ("EmptyLatentImage", "EmptySD3LatentImage"):
            self.understood.add(origin.id)
            width, height = (self.graph.value(origin, side) for side in ("width", "height"))
            if isinstance(width, int) and isinstance(height, int):
                self.found.put("size", f"{width}x{height}", str(origin))
            if (self.graph.value(origin, "batch_size") or 1) != 1:
                self.found.remarks.append(
                    f"{origin}: a batch of {self.graph.value(origin, 'batch_size')} shares one stream of noise there; "
                    "only its first picture can be made again"
                )
            if self.graph.value(node, "denoise") not in (None, 1, 1.0):
                denoise = self.graph.value(node, "denoise")
                self.found.remarks.append(
                    f"{node}: denoise {denoise} of an empty latent: has no counterpart here"
                )
            return
        self._take(node, "denoise", "strength")
        for step in self.graph.upstream(origin):
            self.understood.add(step.id)
            if step.kind in ("LoadImage", "LoadImageMask"):
                self.found.remarks.append(
                    f"{step}: it starts from {step.inputs.get('image')}; give it with --init-img"
                )

    def _model(self, node: Node, role: str) -> None:
        """The checkpoint behind the sampler, and what lies between."""
        for step in self._chain(node, "model"):
            self.understood.add(step.id)
            if "ckpt_name" in step.inputs:
                name = str(step.inputs["ckpt_name"])
                self.found.models[role] = ModelRecord(base_name(name), None)
            elif "lora_name" in step.inputs:
                self._lora(step)
            elif step.kind == "RescaleCFG":
                self._take(step, "multiplier", "cfg_rescale")
            elif step.kind == "ModelSamplingDiscrete":
                self._sampling(step)
            else:
                self.understood.discard(step.id)

    def _sampling(self, node: Node) -> None:
        kinds = {"v_prediction": "v", "eps": "eps"}
        said = str(node.inputs.get("sampling"))
        self.found.put("prediction", kinds.get(said, said), f"{node}: sampling {said}")
        if node.inputs.get("zsnr"):
            self.found.put("zero_terminal_snr", True, f"{node}: zsnr")

    def _lora(self, node: Node) -> None:
        """The loader nearest to the sampler comes first on the way, and changed the weights last."""
        name = base_name(str(node.inputs["lora_name"]))
        scale, clip = (self.graph.value(node, f"strength_{part}") for part in ("model", "clip"))
        # LoraLoaderModelOnly leaves the text encoders as they are
        spec = f"{name}:{scale}:{0 if clip is None else clip}"
        self.found.fields["lora"] = [spec, *self.found.fields.get("lora", ())]

    def _prompt(self, node: Node, name: str, field: str) -> None:
        end = self.graph.source(node, name)
        if end is None:
            return
        if end.kind == "ConditioningZeroOut":
            self._mark(node, name)
            self.found.fields[field] = None
            return
        text = next((n for n in self.graph.upstream(end) if n.kind.startswith("CLIPTextEncode")), None)
        if text is None:
            self.found.remarks.append(f"{end}: no prompt is found behind it")
            return
        for step in self.graph.upstream(text):
            if step.kind == "CLIPSetLastLayer":
                self.understood.add(step.id)
                layer = self.graph.value(step, "stop_at_clip_layer")
                self.found.put("clip_skip", -int(layer), f"{step}: stop_at_clip_layer {layer}")
            elif "ckpt_name" in step.inputs or any(key in step.inputs for key in _TEXT_INPUTS):
                self.understood.add(step.id)
        self.understood.add(text.id)
        self._texts(text, field)

    def _texts(self, node: Node, field: str) -> None:
        """The texts of an encoder node, and the sizes of SDXL's own."""
        said = self.graph.value(node, "text")
        large, small = self.graph.value(node, "text_g"), self.graph.value(node, "text_l")
        main = said if isinstance(said, str) else small if isinstance(small, str) else large
        if not isinstance(main, str):
            self.found.remarks.append(f"{node}: its text is computed by other nodes; give it yourself")
            main = ""
        self.found.fields[field] = main
        if isinstance(large, str) and isinstance(small, str) and large != small:
            second = "prompt_2" if field == "prompt" else "negative_prompt_2"
            self.found.put(second, large, f"{node}: text_g")
        if node.kind == "CLIPTextEncodeSDXL":
            prefix = "" if field == "prompt" else "negative_"
            for name, sides, between in _SIZES:
                values = [self.graph.value(node, side) for side in sides]
                if all(isinstance(value, int) for value in values):
                    self.found.put(f"{prefix}{name}", between.join(map(str, values)), str(node))

    def _vae(self, node: Node) -> None:
        self.understood.add(node.id)
        origin = self.graph.source(node, "vae")
        if origin is not None and "vae_name" in origin.inputs:
            self.understood.add(origin.id)
            self.found.models["vae"] = ModelRecord(base_name(str(origin.inputs["vae_name"])), None)

    def _take(self, node: Node, name: str, field: str) -> None:
        value = self.graph.value(node, name)
        if value is not None:
            self.found.put(field, str(value), f"{node}: {name} {value}")

    def _mark(self, node: Node, name: str) -> None:
        """Everything behind an input is understood."""
        origin = self.graph.source(node, name)
        if origin is not None:
            self.understood |= {step.id for step in self.graph.upstream(origin)}

    def _chain(self, node: Node, name: str) -> Iterator[Node]:
        """The nodes a model passes through, from the sampler back to the file."""
        seen = {node.id}
        while (origin := self.graph.source(node, name)) is not None and origin.id not in seen:
            seen.add(origin.id)
            yield origin
            node = origin

    def _checkpoint(self, node: Node) -> str | None:
        return next(
            (
                str(step.inputs["ckpt_name"])
                for step in self._chain(node, "model")
                if "ckpt_name" in step.inputs
            ),
            None,
        )


_SIZES = (
    ("original_size", ("width", "height"), "x"),
    ("crop_top_left", ("crop_h", "crop_w"), ","),
    ("target_size", ("target_width", "target_height"), "x"),
)
"""Field, the inputs of CLIPTextEncodeSDXL it is made of, and what stands between them."""
