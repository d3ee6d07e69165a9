"""Device time of transformers' `_speculative_sampling` at batch 1, by torch's profiler: a process of its own.

python bench/gpu/torch_step.py OUT.json
"""

import sys
from inspect import signature

import results
import torch  # pyright: ignore[reportMissingImports]
from torch.profiler import ProfilerActivity, profile  # pyright: ignore[reportMissingImports]
from transformers.generation.utils import _speculative_sampling  # pyright: ignore[reportMissingImports]

POINTS = [(k, v, dtype) for dtype in ("bfloat16", "float32") for v in (32000, 128256, 151936) for k in (4, 8)]
CALLS = 30
# Older versions ask for it.
LAST = {"is_done_candidate": False} if "is_done_candidate" in signature(_speculative_sampling).parameters else {}


def main():
    rows = []
    for num_draft, vocab_size, name in POINTS:
        dtype = getattr(torch, name)
        generator = torch.Generator("cuda").manual_seed(0)
        sets = []
        for _ in range(40):
            target = 3 * torch.randn(1, num_draft + 1, vocab_size, generator=generator, device="cuda")
            draft = target[:, :-1] + 0.5 * torch.randn(target[:, :-1].shape, generator=generator, device="cuda")
            tokens = torch.multinomial(draft[0].softmax(-1), 1, generator=generator).T
            sets.append((tokens, draft.to(dtype), target.to(dtype)))

        def call(i, sets=sets, num_draft=num_draft):
            tokens, draft, target = sets[i % len(sets)]
            return _speculative_sampling(tokens, draft, num_draft, target, **LAST)

        for i in range(5):
            call(i)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            for i in range(CALLS):
                call(i)
            torch.cuda.synchronize()
        events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        us = sum(e.time_range.elapsed_us() for e in events) / CALLS
        rows.append(
            {"point": [1, num_draft, vocab_size, name], "us": round(us, 2), "launches": round(len(events) / CALLS, 1)}
        )
        print(rows[-1], flush=True)
        results.write(sys.argv[1], {"device": torch.cuda.get_device_name(), "torch": torch.__version__}, rows)


if __name__ == "__main__":
    main()
