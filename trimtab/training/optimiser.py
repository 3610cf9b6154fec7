"""AdamW on fp32 master weights, whatever the model computes in.

A model that computes in bf16 cannot be its own optimiser's weights: at lr 1e-6 most updates are smaller
than bf16's spacing and vanish. So the masters and their moments are fp32, gradients of every micro-batch
are added up in fp32, and the compute weights are a rounded copy. A model in fp32 or fp64 is its own master.
So is one whose weights are spread over processes: it keeps wide ones, and a pass rounds what it gathers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from trimtab.errors import InputError, NotFinite
from trimtab.models.shards import is_part, like, local, norm, on_gradients, put, reshard
from trimtab.parallel.world import world
from trimtab.training.config import TrainConfig


class Optimiser:
    """Owns what training changes: the masters, their moments, the number of updates."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        compute_dtype: torch.dtype,
        *,
        beside: Mapping[str, nn.Parameter] | None = None,
        beside_lr: float = 0.0,
    ) -> None:
        """``beside``: parameters that learn with the model's but are no part of it (a value head).

        They are their own masters, in their own dtype. ``beside_lr``: their peak rate, which follows the same
        schedule; 0 takes the model's.
        """
        self.config = config
        reshard(model)
        self._model = model
        self.beside = dict(beside or {})
        self.beside_scale = beside_lr / config.lr if beside_lr and config.lr else 1.0
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise InputError("the model has no trainable parameters")
        self.named |= self.beside
        self.masters: dict[str, nn.Parameter] = {}
        self._collected: set[str] = set()
        """Rounded parameters that already have a gradient in this step."""
        for name, parameter in self.named.items():
            if parameter.dtype == compute_dtype or name in self.beside or is_part(parameter):
                self.masters[name] = parameter
                continue
            self.masters[name] = nn.Parameter(parameter.detach().clone())
            self.masters[name].grad = torch.zeros_like(parameter)
            parameter.data = parameter.data.to(compute_dtype)
            parameter.register_post_accumulate_grad_hook(self._collect(name, self.masters[name]))
        # Buffers stay as they are: rotary frequencies rounded to bf16 would move every position.
        for parameter in model.parameters():
            # A quantised base is not of floating-point numbers.
            if not parameter.requires_grad and parameter.is_floating_point() and not is_part(parameter):
                parameter.data = parameter.data.to(compute_dtype)
        on_gradients(model, self._collected)
        self._parts = dict.fromkeys(sorted(n for n, master in self.masters.items() if is_part(master)))
        """The weights that learn of which each process holds a part."""
        own = [master for name, master in self.masters.items() if name not in self.beside]
        groups = [{"params": own}, *([{"params": list(self.beside.values())}] if self.beside else [])]
        self.adam = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _collect(self, name: str, master: nn.Parameter) -> Callable[[torch.Tensor], None]:
        # Without self, which leads back to the parameter: a circle through a hook is one that Python's
        # collector does not see, and a study would keep the memory of every run.
        collected = self._collected

        def hook(parameter: torch.Tensor) -> None:
            assert master.grad is not None
            assert parameter.grad is not None
            # The first micro-batch overwrites, which spares a pass that would only write zeros.
            if name in collected:
                master.grad.add_(parameter.grad)
            else:
                master.grad.copy_(parameter.grad)
                collected.add(name)
            parameter.grad = None

        return hook

    def backward(self, loss: torch.Tensor, *, checked: bool = True) -> float:
        """Add this micro-batch's gradient. Raises NotFinite for a loss that is not finite, if ``checked``."""
        value = loss.item()
        if checked and not math.isfinite(value):
            raise NotFinite(f"the loss is {value}")
        loss.backward()
        return value

    def step(self, lr: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping.

        Raises NotFinite, the weights untouched, for a gradient that is not finite.
        """
        self._sum_over_processes()
        idle: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            if self.named[name] is not master and name not in self._collected and master.grad is not None:
                # What had no gradient is left alone, in bf16 as in fp32: neither moments nor decay move it.
                idle[name], master.grad = master.grad, None
        try:
            return self._step(lr)
        finally:
            for name, buffer in idle.items():
                self.masters[name].grad = buffer

    def _sum_over_processes(self) -> None:
        """Each process has the gradient of its own groups; afterwards all have the batch's.

        That of a weight which is spread is the batch's already, zeros where no process had one.
        """
        here = world()
        if here.alone:
            return
        parts = set(self._parts)
        kept = {n for n, m in self.masters.items() if m is self.named[n] and m.grad is not None} - parts
        own = self._collected | kept
        names = set().union(*here.gather(sorted(own)))
        for name in parts - names:
            self.masters[name].grad = None
        grads = []
        for name in sorted(names - parts):
            master = self.masters[name]
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            elif name not in own:
                master.grad.zero_()
            self._collected.add(name)
            grads.append(master.grad)
        here.add_tensors(grads)

    def _step(self, lr: float) -> float:
        masters = [m for name, m in self.masters.items() if name not in self._parts]
        total = nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None], foreach=True)
        parts = [g for name in self._parts if (g := self.masters[name].grad) is not None]
        if parts:
            total = total.new_tensor(math.hypot(norm(parts), total.item()), dtype=torch.float64)
        found = total.item()
        if not math.isfinite(found):
            self.clear()
            raise NotFinite(f"the gradient's norm is {found}")
        if 0 < self.config.grad_clip < found:
            # Only then: a pass over every gradient that multiplies by 1 is a pass too many.
            nn.utils.clip_grads_with_norm_(masters, self.config.grad_clip, total, foreach=True)
            if parts:
                torch._foreach_mul_([local(part) for part in parts], self.config.grad_clip / (found + 1e-6))
        for group, scale in zip(self.adam.param_groups, (1.0, self.beside_scale), strict=False):
            group["lr"] = lr * scale
        self.adam.step()
        with torch.no_grad():
            rounded = [(self.named[n], m) for n, m in self.masters.items() if self.named[n] is not m]
            if rounded:
                torch._foreach_copy_([p.data for p, _ in rounded], [m.data for _, m in rounded])
        self.clear()
        return found

    def clear(self) -> None:
        """Forget the gradients; the masters of a rounded model keep their buffers."""
        self._collected.clear()
        for name in self.masters:
            # A rounded parameter has one only where a backward pass was broken off.
            self.named[name].grad = None
        if self._parts:  # what a pass gathered and left whole is of before the step
            reshard(self._model)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Masters and moments by name, for a checkpoint; of weights that are spread DTensors."""
        out = {f"master.{name}": m.detach() for name, m in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                out[f"{key}.{name}"] = value
        return out

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of :meth:`tensors`; each may be whole or laid out as its weight.

        Raises InputError when names or shapes do not fit the model.
        """
        with torch.no_grad():
            for name, master in self.masters.items():
                saved = tensors.get(f"master.{name}")
                if saved is None or saved.shape != master.shape:
                    raise InputError(f"the checkpoint does not fit the model: weight {name!r} differs")
                put(master, saved)
                if self.named[name] is not master:
                    put(self.named[name], saved)
                moments = {
                    key: self._placed(tensors[f"{key}.{name}"], master)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
                if moments:
                    self.adam.state[master] = moments
        reshard(self._model)

    @staticmethod
    def _placed(moment: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
        placed = like(moment, master) if moment.dim() or not is_part(master) else moment
        return placed.to(master.device, copy=True)
