"""Stands for CUDA graphs on a CPU: work is done again when it is replayed, and writes where its first results are.

So the tests compute with what replays need: tensors at fixed addresses, copies into them, sums of gradients.
"""


class CpuRecorder:
    replays = 0  # of all recorders

    def warm_up(self, work):
        work()

    def record(self, work):
        results = list(work())

        def replay():
            CpuRecorder.replays += 1
            for place, result in zip(results, work(), strict=True):
                place.data.copy_(result.detach())  # unseen by autograd, as what a card writes

        return results, replay
