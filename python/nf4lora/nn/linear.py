"""NF4Linear: a frozen linear layer in 4 bits, and all of its state.

Every tensor of the layer is a parameter, never a buffer: DDP broadcasts buffers at each step, and accelerate's loading
for FSDP2 fails on them. The float32 scales are stored as int32 tensors with the same bits, so that neither
`.to(torch.bfloat16)` nor a mixed-precision policy can round them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import ops
from nf4lora.compat.torch import Unreplicated, is_any_autocast_enabled, parameters_of
from nf4lora.nn.packed_weight import PackedWeight
from nf4lora.ops import BLOCKSIZES, NESTED_BLOCKSIZE

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def blocksize_for(in_features: int, blocksize: int) -> int | None:
    """The largest legal blocksize up to `blocksize` that divides in_features; None: the layer must stay in 16 bits.

    Raises:
        ValueError: blocksize is not legal.

    >>> blocksize_for(576, 64), blocksize_for(96, 64), blocksize_for(100, 64)
    (64, 32, None)
    """
    check_blocksize("blocksize_for", blocksize)
    return next((size for size in reversed(BLOCKSIZES) if size <= blocksize and in_features % size == 0), None)


def check_blocksize(who: str, blocksize: int) -> None:
    """Refuse anything but a power of two between 32 and 4096."""
    if isinstance(blocksize, bool) or not isinstance(blocksize, int):
        raise TypeError(f"{who}: blocksize must be an int, got {type(blocksize).__name__}")
    if blocksize not in BLOCKSIZES:
        least, most = BLOCKSIZES[0], BLOCKSIZES[-1]
        raise ValueError(f"{who}: blocksize must be a power of two between {least} and {most}, got {blocksize}")


class NF4Linear(Unreplicated, nn.Linear):
    """A linear layer whose weight is stored in NF4 and stays frozen: `y = x W^T + bias + scaling (x A^T) B^T`.

    `W[n, k] = round_to_dtype(code[q[n, k]] * absmax[n, k // blocksize])`, where the dtype is the one that the layer
    computes in: `compute_dtype` if it is given, else that of autocast where it is on, else that of x. The result has
    autocast's dtype where it is on, else that of x.

    State (N = out_features, K = in_features):
        weight: [N, K/2] uint8, two codes a byte, the lower k in the high nibble
        weight_absmax: [N, K/blocksize] uint8; int32 (bits of float32) without double quantisation
        weight_nested: [ceil(N*K/blocksize/256) + 1] int32 (bits of float32), the offset last; double quantisation only
        bias: [N], as in the model
    The attribute `weight` is a guard around the parameter of that name: code that multiplies by it, or writes
    floating-point values into it, gets a ValueError (`nf4lora.nn.packed_weight`).

    Raises:
        ValueError: a blocksize that is not legal or does not divide in_features; a compute_dtype that is none of
            float32, bfloat16, float16.

    >>> layer = NF4Linear.from_linear(torch.nn.Linear(128, 16))
    >>> layer(torch.ones(2, 128)).shape, layer.weight.shape
    (torch.Size([2, 16]), torch.Size([16, 64]))
    """

    why_no_replica = (
        "NF4Linear: a model must be run by one process a GPU, got torch.nn.DataParallel, which copies it at each "
        "step, and which transformers' Trainer uses where a process sees several GPUs; set CUDA_VISIBLE_DEVICES=0, "
        "or start a process for each: torchrun --nproc_per_node=2 script.py"
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate and draw a float weight
        check_blocksize("NF4Linear", blocksize)
        if in_features % blocksize:
            raise ValueError(
                f"NF4Linear: in_features must be a multiple of blocksize {blocksize}, got {in_features}; "
                f"blocksize_for({in_features}, {blocksize}) is {blocksize_for(in_features, blocksize)}"
            )
        if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"NF4Linear: compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.double_quant, self.compute_dtype = blocksize, double_quant, compute_dtype

        def packed(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        blocks = in_features // blocksize
        self.weight = packed(out_features, in_features // 2, dtype=torch.uint8)
        self.weight_absmax = packed(out_features, blocks, dtype=torch.uint8 if double_quant else torch.int32)
        if double_quant:
            self.weight_nested = packed(-(-out_features * blocks // NESTED_BLOCKSIZE) + 1, dtype=torch.int32)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @staticmethod
    def pack(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> dict[str, Tensor]:
        """Quantise a weight to the tensors that the layer stores, by name.

        Args:
            weight: [N, K] float32, bfloat16 or float16

        Returns:
            weight, weight_absmax and, with double quantisation, weight_nested; as in the class

        Raises:
            ValueError: NaN or Inf in the weight; K is no multiple of blocksize.

        >>> {name: tuple(t.shape) for name, t in NF4Linear.pack(torch.ones(4, 128)).items()}
        {'weight': (4, 64), 'weight_absmax': (4, 2), 'weight_nested': (2,)}
        """
        qweight, absmax = ops.nf4_quantize(weight.detach(), blocksize)
        if not double_quant:
            return {"weight": qweight, "weight_absmax": absmax.view(torch.int32)}
        absmax_q, nested = ops.absmax_quantize(absmax)
        return {"weight": qweight, "weight_absmax": absmax_q, "weight_nested": nested.view(torch.int32)}

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Linear:
        """Quantise a linear layer; the bias is shared with it, the weight is not.

        Raises:
            ValueError: NaN or Inf in the weight; in_features is no multiple of blocksize.

        >>> NF4Linear.from_linear(torch.nn.Linear(64, 8, bias=False), blocksize=32)
        NF4Linear(in_features=64, out_features=8, bias=False, blocksize=32, double_quant=True)
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            blocksize=blocksize,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            device="meta",
        )
        for name, tensor in cls.pack(linear.weight, blocksize, double_quant).items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        layer.register_parameter("bias", linear.bias)
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The packed codes, [N, K/2] uint8. Their shape, dtype and device can be read; arithmetic with them raises."""
        parameter: Any = parameters_of(self).get("weight", self.__dict__.get("weight"))
        if parameter is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")
        if type(parameter) is PackedWeight:
            parameter = self._unguarded()
        guarded = type(parameter) is nn.Parameter and parameter.dtype == torch.uint8  # a shard guards itself
        if not guarded or torch.compiler.is_compiling():
            return parameter
        known = self.__dict__.get("_guard")
        guard = None if known is None else known()
        if guard is None or guard.codes is not parameter:
            guard = PackedWeight(parameter)
            # A weak reference: the guard holds the parameter, which must be freed once the layer has replaced it.
            self.__dict__["_guard"] = weakref.ref(guard)
        return guard

    @weight.setter
    def weight(self, tensor: Tensor) -> None:  # for plain tensors; nn.Module registers a parameter without calling this
        self.__dict__["weight"] = tensor

    def _unguarded(self) -> nn.Parameter:
        """The codes as a plain parameter, where accelerate's offloading has registered their guard as the parameter."""
        codes = parameters_of(self)["weight"].codes  # type: ignore[union-attr]
        # `type(...) is`, since isinstance is also true for a plain tensor that torch has marked as a parameter.
        parameter: Any = codes if type(codes) is nn.Parameter else nn.Parameter(codes, requires_grad=False)
        parameters_of(self)["weight"] = parameter
        return parameter

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param.codes if isinstance(param, PackedWeight) else param)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_guard"}

    def absmax(self) -> Tensor:
        """The scale of each block, decoded: [N, K/blocksize] float32."""
        arguments = self.op_arguments()
        if arguments["nested"] is None:
            return arguments["absmax"]
        return ops.absmax_dequantize(arguments["absmax"], arguments["nested"])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the layer computes with in this dtype: [N, K].

        Without a dtype: in compute_dtype, or else in float32. The float32 weight rounded to another dtype is the weight
        that the layer uses in that dtype.
        """
        codes = self.op_arguments()["qweight"]
        return ops.nf4_dequantize(codes, self.absmax(), self.blocksize, dtype or self.compute_dtype or torch.float32)  # type: ignore[arg-type]

    def op_arguments(self) -> dict[str, Any]:
        """The layer's state as `ops.lora_linear` takes it: qweight, absmax, nested (float32 views) and blocksize."""
        codes, absmax, nested = self.packed()
        return {"qweight": codes, "absmax": absmax, "nested": nested, "blocksize": self.blocksize}

    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """qweight, absmax and nested, as in op_arguments."""
        state: Any = parameters_of(self)  # an attribute of a module takes half a microsecond to find
        codes, absmax, nested = state["weight"], state["weight_absmax"], None
        if self.double_quant:
            # Made anew at each call: to check whether a view that was kept is still that of this memory takes as long.
            nested = state["weight_nested"].view(torch.float32)
        else:
            absmax = absmax.view(torch.float32)
        if type(codes) is PackedWeight:
            codes = self._unguarded()
        return codes, absmax, nested

    # A generated token calls hundreds of layers. A conversion that changes nothing, or an attribute of a module, takes
    # a microsecond, so both are avoided in what a call runs.

    def dtypes_for(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes that the layer computes in and that it returns for this x.

        Raises:
            TypeError: x holds no floating-point values.
        """
        result_dtype = x.dtype
        if not result_dtype.is_floating_point:
            raise TypeError(
                f"NF4Linear: x must be float32, bfloat16 or float16, got {result_dtype}; if the model casts its hidden "
                f"states to the dtype of this layer's weight, which is packed, keep the layer in 16 bits: "
                f"NF4Config(modules_to_not_convert=[its name])"
            )
        if is_any_autocast_enabled():
            kind = x.device.type
            if kind != "meta" and torch.is_autocast_enabled(kind):
                result_dtype = torch.get_autocast_dtype(kind)
        return self.compute_dtype or result_dtype, result_dtype

    def bias_parameter(self) -> Tensor | None:
        """The bias as it is."""
        state: Any = parameters_of(self)
        return state["bias"] if "bias" in state else self.bias

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """y = x W^T + bias, and with an adapter + scaling (dropout(x) lora_A^T) lora_B^T.

        Args:
            x: [..., K] float32, bfloat16 or float16
            lora_A: [R, K] float32;  lora_B: [N, R] float32
            seed: [1] int64, of the dropout mask

        Returns:
            [..., N] in the dtype of x, or of autocast where it is on
        """
        dtype, result_dtype = self.dtypes_for(x)
        if x.dtype != dtype:
            x = x.to(dtype)
        trained = self.bias_parameter()
        bias = trained if trained is None or trained.dtype == dtype else trained.detach().to(dtype)
        codes, absmax, nested = self.packed()
        y = ops.lora_linear(
            x,
            codes,
            absmax,
            nested,
            bias,
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=scaling,
            dropout=dropout,
            seed=seed,
            blocksize=self.blocksize,
        )
        if trained is not None and trained.requires_grad and torch.is_grad_enabled():
            # The op gives no gradient for the bias, which PEFT's bias="all" and "lora_only" train. So add an exact zero
            # that has this gradient: the result is then the same whether the bias is trained or not.
            y = y + (trained - trained.detach()).to(y.dtype)
        return y if result_dtype == dtype else y.to(result_dtype)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, blocksize={self.blocksize}, double_quant={self.double_quant}"
        return text if self.compute_dtype is None else f"{text}, compute_dtype={self.compute_dtype}"

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Codes are useless without their scales, and copy_ would silently convert a tensor of another dtype. Both are
        # errors even with strict=False. For a state dict with none of the layer's tensors (an adapter's), `strict`
        # decides.
        expected = {name: p for name, p in parameters_of(self).items() if name.startswith("weight") and p is not None}
        present = {name for name in expected if prefix + name in state_dict}
        for name, parameter in expected.items():
            if present and name not in present:
                error_msgs.append(f"NF4Linear: {prefix}{name} must come with {prefix}{min(present)}, got nothing")
            elif name in present and (dtype := state_dict[prefix + name].dtype) != parameter.dtype:
                error_msgs.append(
                    f"NF4Linear: {prefix}{name} must be {parameter.dtype}, got {dtype}; a 16-bit weight is quantised "
                    f"with NF4Linear.from_linear, and double_quant must be as when the weight was packed"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
