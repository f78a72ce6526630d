"""The networks of every peer, and the process in which `models.py` runs one of them.

With the same weights all peers compute the same class scores, except that PyTorchVideo pads its first pooling: it is
compared with ours built so. What is timed is what a user of each calls: Keras' `train_on_batch` (the compiled step of
`fit`) and `predict_on_batch`; in PyTorch, eager, the loop that its tutorials show.
"""

import importlib.metadata
import pickle

import numpy as np
import peers

# Peer: its library, the packages whose versions the report names, and the padding of its first pooling.
PEERS = {
    "ours": ("tensorflow", ("tensorflow", "keras"), "valid"),
    "pytorchvideo": ("torch", ("torch", "pytorchvideo"), "same"),
    "twin": ("torch", ("torch",), "valid"),
}
# Network: its builder in keras_nonlocal.applications, and in PyTorchVideo.
NETWORKS = {"C2D R50": ("C2DResNet50", "c2d_r50"), "I3D R50": ("I3DResNet50", "i3d_r50")}
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4


def is_inflated(network):
    return network.startswith("I3D")


# What every process gets


def make_clips(batch, shape):
    """Clips and labels to train on, and two clips whose scores are compared."""
    from tests.release_twin import random_clips

    clips = random_clips((*shape, 3), count=batch + 2)
    labels = np.random.default_rng(0).integers(0, 400, batch)
    return clips[2:], labels, clips[:2]


def make_weights(folder, network):
    """Writes a file in the format of the authors' release with the five blocks, and one without; their paths."""
    from tests.release_twin import random_blobs, write_release

    blobs = random_blobs(50, is_inflated(network), 5)
    paths = {}
    for blocks in (0, 5):
        paths[blocks] = str(folder / f"{network} {blocks}.pkl")
        kept = {name: blob for name, blob in blobs.items() if blocks or not name.startswith("nonlocal")}
        write_release(paths[blocks], kept)
    return paths


def read_weights(path):
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")["blobs"]


# The peers. Each builder returns the network, with dropout as it comes or of another rate.


def build_ours(network, blocks, shape, path, pool1_padding="valid", **options):
    from keras_nonlocal import applications

    build = getattr(applications, NETWORKS[network][0])
    return build(
        weights=path, non_local=blocks, input_shape=(*shape, 3), pool1_padding=pool1_padding, name=None, **options
    )


def build_twin(network, blocks, shape, path, dropout=0.5):
    """The same graph in PyTorch: `tests/release_twin.py`, in the memory format that suits a CPU."""
    import torch
    from torch.nn import functional

    from tests.release_twin import ReleaseTwin

    class Graph(ReleaseTwin):
        def blob(self, name):
            return getattr(self.blobs, name)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, blob in read_weights(path).items():
                if name.endswith(("_rm", "_riv")):
                    self.register_buffer(name, torch.from_numpy(blob))
                else:
                    self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(blob)))
            self.to(memory_format=torch.channels_last_3d)

        def __contains__(self, name):
            return hasattr(self, name)

        def forward(self, x):
            graph.training = self.training
            x = functional.dropout(graph.backbone(x), dropout, self.training)
            return functional.linear(x, self.pred_w, self.pred_b)

    module = Network()
    graph = Graph(module, 50, is_inflated(network), blocks)
    return module


def build_pytorchvideo(network, blocks, shape, path, dropout=0.5):
    import pipelines
    import torch

    from tests.release_twin import positions

    pipelines.import_pytorchvideo()
    from pytorchvideo.layers.nonlocal_net import create_nonlocal
    from pytorchvideo.models import hub

    frames, height, width = shape
    last = (frames // 2, -(-height // 32), -(-width // 32))  # its head averages over so much
    module = getattr(hub, NETWORKS[network][1])(dropout_rate=dropout, head_pool_kernel_size=last)
    blobs = read_weights(path)

    def fill(layer, name, norm=None):
        suffixes = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
        state = layer.state_dict()
        for key, tensor in state.items():
            if key in ("weight", "bias") and norm is None:
                tensor.copy_(torch.from_numpy(blobs.pop(f"{name}_{key[0]}")).reshape(tensor.shape))
            elif norm is not None and key in suffixes:
                tensor.copy_(torch.from_numpy(blobs.pop(f"{norm}_{suffixes[key]}")))

    def fill_pair(convolution, norm, name, norm_name):
        fill(convolution, name)
        fill(norm, None, norm_name)

    stem, *_, head = module.blocks
    fill_pair(stem.conv, stem.norm, "conv1", "res_conv1_bn")
    fill(head.proj, "pred")
    stages = [block.res_blocks for block in module.blocks if hasattr(block, "res_blocks")]
    for stage, residual_blocks in enumerate(stages, 2):
        for number, block in enumerate(residual_blocks):
            branch = f"res{stage}_{number}_branch"
            if number == 0:
                fill_pair(block.branch1_conv, block.branch1_norm, f"{branch}1", f"{branch}1_bn")
            for letter in "abc":
                layers = (getattr(block.branch2, f"{kind}_{letter}") for kind in ("conv", "norm"))
                fill_pair(*layers, f"{branch}2{letter}", f"{branch}2{letter}_bn")
        for number in positions(50, blocks).get(stage, ()):
            channels = residual_blocks[number].branch2.conv_c.out_channels
            non_local = create_nonlocal(dim_in=channels, dim_inner=channels // 2, pool_size=(1, 2, 2))
            name = f"nonlocal_conv{stage}_{number}"
            for part in ("theta", "phi", "g", "out"):
                fill(getattr(non_local, f"conv_{part}"), f"{name}_{part}")
            fill(non_local.norm, None, f"{name}_bn")
            residual_blocks[number] = torch.nn.Sequential(residual_blocks[number], non_local)
    if blobs:
        raise ValueError(f"Every weight must have its place. Received: {sorted(blobs)}")
    return module


# Passes: inference, and a training step: forward, cross-entropy, backward to all weights, SGD.


def keras_passes(model, clips, labels):
    import keras

    optimizer = keras.optimizers.SGD(LEARNING_RATE, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return {
        "inference": lambda: [model.predict_on_batch(clips)],
        "training": lambda: [model.train_on_batch(clips, labels)],
    }


def torch_passes(module, clips, labels):
    import torch

    labels = torch.from_numpy(labels)
    optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)

    def inference():
        module.eval()
        with torch.inference_mode():
            return [module(clips)]

    def training():
        module.train()
        loss = torch.nn.functional.cross_entropy(module(clips), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return [loss]

    return {"inference": inference, "training": training}


def log_probabilities(scores, are_logits):
    scores = np.asarray(scores, "float64")
    if are_logits:
        scores = scores - scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return np.log(np.maximum(scores, np.finfo("float32").tiny))


def difference(scores, expected):
    """The largest difference of two lists of log-probabilities, relative to the largest of them."""
    scores, expected = np.asarray(scores), np.asarray(expected)
    return float(np.abs(scores - expected).max() / np.abs(expected).max())


# The process


class Worker(peers.Worker):
    def describe(self):
        library, packages, _ = PEERS[self.peer]
        peers.limit_threads(self.threads, library)
        for name in packages:
            __import__(name)
        self.loaded = peers.resident("VmRSS")
        return {"versions": {name: importlib.metadata.version(name) for name in packages}}

    def build(self, network, blocks, shape, batch, weights):
        """Gets ready to run. Replies with what is compared: the number of parameters, and log-probabilities of two
        clips; of ours also the multiply-adds, by the padding of the first pooling, as the log-probabilities."""
        clips, labels, compared = make_clips(batch, shape)
        if self.peer != "ours":
            import torch

            def tensor(x):
                x = torch.from_numpy(x).permute(0, 4, 1, 2, 3)
                return x if self.peer == "twin" else x.contiguous()

            build = build_twin if self.peer == "twin" else build_pytorchvideo
            module = build(network, blocks, shape, weights)
            scores = [torch_passes(module, tensor(clip[None]), labels[:1])["inference"]()[0] for clip in compared]
            self.passes = torch_passes(module, tensor(clips), labels)
            found = log_probabilities(np.concatenate(scores), are_logits=True).tolist()
            return {"parameters": sum(p.numel() for p in module.parameters()), "scores": found}

        import keras

        from keras_nonlocal import applications

        scores, macs = {}, {}
        for padding in ("same", "valid"):  # last the one that is timed
            keras.backend.clear_session()
            model = build_ours(network, blocks, shape, weights, padding)
            costs = applications.summarize(model)
            found = np.concatenate([model.predict_on_batch(clip[None]) for clip in compared])
            scores[padding], macs[padding] = log_probabilities(found, are_logits=False).tolist(), costs.macs
        self.passes = keras_passes(model, clips, labels)
        return {"parameters": costs.parameters, "macs": macs, "scores": scores}

    def run(self, mode, probe):
        """The second of two runs, as in a training, where a step follows a step.

        After a turn of another peer, the first finds cold caches, and PyTorch's threads, which stay busy for a while.

        A `probe` also measures memory: the peak of the run above what the process held with its libraries loaded. That
        counts the weights, too, as TensorFlow's allocator keeps what it once had: the peak above what was held before
        the run would be next to nothing.
        """
        reply = super().run(mode, probe=False)
        if "failure" in reply:
            return reply
        peers.reset_peak()
        reply = super().run(mode, probe=False)
        return {**reply, "extra_bytes": max(peers.resident("VmHWM") - self.loaded, 0)} if probe else reply
