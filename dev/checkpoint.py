#!/usr/bin/env python3
"""Checkpoints and files of weights outside of the trainer: validation loss, conversion, table.

    dev/checkpoint.py loss PATH... [--val PATTERN] [--val-tokens N] [--tolerance X] [--device D]
    dev/checkpoint.py convert PATH OUT.safetensors [--state]
    dev/checkpoint.py table PATH

PATH is a checkpoint (the directory OUT/checkpoints/step_000750) or a file of weights
(OUT/model.safetensors). Of a checkpoint everything is checked first: the manifest's checksum, sizes
and headers of the files, and name, type, shape and checksum of every tensor.

loss      The validation loss, in fp32, of the model below on the tokens that the trainer validates
          on, compared with what the run's log.jsonl says of that step.
          --val         token shards, a file or a quoted pattern; left out: those of the run
          --val-tokens  another number of predictions than the run's; then nothing is compared
          --tolerance   of the difference: 1e-4, and 0.005 of a run in bf16, which rounds all it
                        computes and is followed here without
          --device      cuda or cpu; left out: cuda if there is one
          Exit status 1 if a loss differs.
convert   One file {name: tensor}, all fp32: master weights where there are, else weights; `--load`
          takes it. --state: also NAME.m, NAME.v and NAME.grad, put together from all ranks.
table     Shape, dtype, norm and largest magnitude of every weight and of its optimizer state.

The class Model is a second implementation of every recipe, to be read and to be taken elsewhere. It
is made from the published formulas and from the flags in the file, and shares nothing with the
trainer. W in y = x W^T is (out, in); rms(x) is x / sqrt(mean(x^2) + eps).

Needs torch and safetensors. Messages and tests: test/checkpoint_py.sh
"""
import argparse
import glob
import json
import math
import os
import re
import struct
import sys
import time
import zlib

try:
    import torch
    import torch.nn.functional as F
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f"checkpoint: {error}\n            pip install torch safetensors numpy")

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
             struct.error)    # what JSON of another form, or sizes that do not fit, run into
KINDS = ("weight", "master", "m", "v", "grad")
CHUNK = 1024                  # tokens for which logits and MLP are computed at a time
QUERIES = 512                 # at most so many see their keys at a time,
SCORES = 1 << 25              # with at most so many scores


class Problem(Exception):
    """What is wrong with the input, in the user's words."""


def wrong(path, found, expected):
    raise Problem(f"{path}: found {found}, expected {expected}")


# ---- files ---------------------------------------------------------------------------------------

def crc_of(tensor):
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def read_tensors(path):
    """{name: tensor} and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise Problem(f"{path}: {error}") from None


def read_header(path):
    """What stands before the data."""
    with open(path, "rb") as file:
        size = file.read(8)
        return size + file.read(struct.unpack("<Q", size)[0])


def read_manifest(directory):
    path = os.path.join(directory, "manifest.json")
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise Problem(f"{directory}: no manifest.json, so this is no checkpoint\n"
                      "name one of OUT/checkpoints/step_*, or a file of weights") from None
    start = raw.rstrip(b"\n").rfind(b"\n") + 1
    last = re.fullmatch(rb'"crc32":"([0-9a-f]{8})"}\n?', raw[start:])
    if not last:
        wrong(path, repr(raw[start:])[:60], "a last line with its crc32: it is cut off")
    if int(last[1], 16) != zlib.crc32(raw[:start]):
        wrong(path, f"crc32 {zlib.crc32(raw[:start]):08x}", f"{last[1].decode()}: it was changed")
    manifest = json.loads(raw)
    if manifest["format"] != "modded-llm.c checkpoint":
        wrong(path, f"format {manifest['format']!r}", "'modded-llm.c checkpoint'")
    if manifest["version"] != 1:
        wrong(path, f"version {manifest['version']!r}", "1, the only one known here")
    return manifest


class Checkpoint:
    """A directory or a file: weights {name: tensor}, state {kind: {name: tensor in fp32}}."""

    def __init__(self, path):
        self.path, self.weights, self.state = path, {}, {}
        try:
            if os.path.isdir(path):
                self.read_directory()
            else:
                self.read_weights()
        except MALFORMED as error:
            raise Problem(f"{path}: its manifest or metadata: {error!r}") from None

    def read_weights(self):
        self.weights, self.metadata = read_tensors(self.path)
        if "flags" not in self.metadata or "step" not in self.metadata:
            wrong(self.path, "no flags and step in its metadata", "a file saved by the trainer")
        self.flags, self.step = json.loads(self.metadata["flags"]), int(self.metadata["step"])
        self.bf16 = self.metadata.get("precision") == "bf16"
        self.run = os.path.dirname(os.path.abspath(self.path))

    def read_directory(self):
        manifest = read_manifest(self.path)
        self.flags, self.step = manifest["flags"], manifest["step"]
        self.bf16 = manifest["precision"] == "bf16"
        self.metadata = {key: manifest[key] for key in ("commit", "precision")}
        if manifest["tokenizer_hash"]:
            self.metadata["tokenizer_hash"] = manifest["tokenizer_hash"]
        self.run = os.path.dirname(os.path.dirname(os.path.abspath(self.path)))
        files, runs = {}, {}
        for entry in manifest["files"]:
            path = os.path.join(self.path, entry["name"])
            if not os.path.exists(path):
                wrong(path, "no such file", "what the manifest lists")
            if os.path.getsize(path) != entry["bytes"]:
                wrong(path, f"{os.path.getsize(path)} bytes", f"{entry['bytes']}")
            if zlib.crc32(read_header(path)) != int(entry["header_crc32"], 16):
                wrong(path, "another header", "that of the manifest: it was changed")
            files[entry["name"]] = read_tensors(path)[0]
        for entry in manifest["tensors"]:
            key = entry["name"] if entry["kind"] == "weight" else f"{entry['name']}.{entry['kind']}"
            path = f"{os.path.join(self.path, entry['file'])}: {key}"
            tensor = files.get(entry["file"], {}).pop(key, None)
            if tensor is None:
                wrong(path, "no such tensor", "each that the manifest lists, once")
            self.take(path, entry, tensor, runs)
        for name, left in files.items():
            if left:
                wrong(os.path.join(self.path, name), min(left), "what the manifest lists alone")
        for (kind, name), parts in runs.items():
            at, size = 0, self.state[kind][name].numel()
            for first, count in sorted(parts) + [(size, 0)]:
                if first > at or (first < at and kind != "grad"):
                    wrong(f"{self.path}: {name}.{kind}", f"elements from {first}", f"from {at}")
                at = max(at, first + count)

    def take(self, path, entry, tensor, runs):
        """One tensor of a file: checked, and put where it belongs in the whole."""
        name, kind, shape, size = entry["name"], entry["kind"], entry["shape"], 1
        for n in shape:
            size *= n
        first, count = entry["offset"], entry["count"]
        if kind not in KINDS:
            wrong(path, f"kind {kind!r}", "one of " + ", ".join(KINDS))
        if tensor.dtype != {"F32": torch.float32, "BF16": torch.bfloat16}[entry["dtype"]]:
            wrong(path, str(tensor.dtype), entry["dtype"])
        if not 0 <= first <= first + count <= size:
            wrong(path, f"{count} elements from {first}", f"a part of {size}")
        if list(tensor.shape) != (shape if count == size else [count]):
            wrong(path, f"shape {list(tensor.shape)}", f"{shape if count == size else [count]}")
        if crc_of(tensor) != int(entry["crc32"], 16):
            wrong(path, f"crc32 {crc_of(tensor):08x}", f"{entry['crc32']}: it was damaged")
        if kind == "weight":
            if count != size:
                wrong(path, "a part of a weight", "all of it")
            self.weights[name] = tensor
            return
        whole = self.state.setdefault(kind, {}).setdefault(name, torch.zeros(shape))
        if list(whole.shape) != shape:
            wrong(path, f"a part of shape {shape}", f"{list(whole.shape)}, as in the files before")
        # Of zeros; of a gradient each rank has a sum of its own, and they are added.
        whole.view(-1)[first:first + count] += tensor.float().view(-1)
        runs.setdefault((kind, name), []).append((first, count))

    def logged_loss(self):
        """The validation loss that the run logged at this step, if it did; and the log."""
        path, loss = os.path.join(self.run, "log.jsonl"), None
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    if '"event":"val"' not in line or not line.endswith("}\n"):
                        continue            # or one that a killed run has not finished
                    event = json.loads(line)
                    if event["step"] == self.step:
                        loss = event["val_loss"]
        return loss, path


# ---- what changes with the step ------------------------------------------------------------------

def numbers(text):
    return [int(x) for x in text.split()]


def pairs(text, separator):
    return [tuple(int(x) for x in pair.split(separator)) for pair in text.split()]


def long_window(s, step):
    """Of the long layers in blocks, in the update (and validation) of `step`; None: no limit."""
    scheduled = s["steps"] - s["extension_steps"]
    if s["windows"] == "none":
        return None
    if s["windows"] == "ramp":              # the least multiple of the block >= window_max t / N
        return max(1, -(-s["window_max"] * min(step, scheduled) // (scheduled * s["window_block"])))
    windows = numbers(s["window_steps"])
    return windows[len(windows) * step // scheduled] if step < scheduled else s["window_extension"]


def windows(s, step):
    """(short, long) of the validation of `step`, in blocks."""
    long = long_window(s, step)
    if long is None:
        return None, None
    short = max(1, long // 2)
    if s["windows"] == "thirds" and step == s["steps"] and s["window_final"]:
        long = s["window_final"]            # only now, and without a change of the rotation
    return short, long


def rotation(s, step):
    """The angle per position of each pair, and the factor of the scores, after YaRN's changes."""
    D = s["channels"] // s["heads"]
    scale = s["attn_scale"] or 1 / math.sqrt(D)
    if s["rotary_half"]:
        f = torch.cat([(1 / s["rotary_base"]) ** torch.linspace(0, 1, D // 4), torch.zeros(D // 4)])
    else:
        f = 1.0 / s["rotary_base"] ** (torch.arange(0, D, 2).float() / D)
    old = long_window(s, 0)
    for t in range(1, step + 1) if s["yarn"] else ():
        new = long_window(s, t)
        if new != old:
            turns = s["window_block"] * old * f / (2 * math.pi)
            keep = ((turns - 1) / 31).clamp(0, 1)
            f = f * (old / new + keep * (1 - old / new))
            scale *= 1 + 0.2 * math.log(new / old)
            old = new
    return f, scale


# ---- the model -----------------------------------------------------------------------------------

def rms(x, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Model:
    """Logits of the tokens of one row, in fp32, as the validation of `step` computes them."""

    def __init__(self, weights, flags, step, device="cpu"):
        self.w = {name: tensor.float().to(device) for name, tensor in weights.items()}
        self.s, self.device = flags, device
        f, self.scale = rotation(flags, step)
        self.f = f.to(device)
        self.short, self.long = windows(flags, step)
        self.long_layers = set(numbers(flags["long_layers"]))
        self.left_out = set(numbers(flags["no_layers"]))
        self.no_attention = set(numbers(flags["no_attention"]))
        self.tables = dict(pairs(flags["value_embeds"], ":"))
        self.gated_skips = pairs(flags["gated_skips"], ">")
        self.end_of_text = flags["end_of_text"]
        if self.end_of_text < 0:
            self.end_of_text = 50256 if flags["vocab"] > 50256 else 256

    def first_keys(self, tokens, layer):
        """The first key that each position sees; it sees all from there to itself."""
        T = len(tokens)
        q = torch.arange(T, device=self.device)
        first = torch.zeros_like(q)
        window = self.long if layer in self.long_layers else self.short
        if window is not None:
            block = self.s["window_block"]
            if self.s["window_by"] == "block":      # block(q) - block(k) < window
                first = (q // block - (window - 1)) * block
            else:                                   # q - k <= window blocks
                first = q - window * block
        if self.s["document_mask"]:
            opens = torch.where(tokens == self.end_of_text, q, torch.zeros_like(q))
            first = torch.maximum(first, opens.cummax(0).values)
        return first.clamp(min=0)

    def rotate(self, x):
        """x (T, H, D); the pairs are (j, j + D/2)."""
        angle = torch.arange(len(x), device=self.device).float()[:, None] * self.f
        c, s = angle.cos(), angle.sin()
        if self.s["rotary_round_bf16"]:
            c, s = c.bfloat16().float(), s.bfloat16().float()
        c, s = c[:, None], s[:, None]
        x1, x2 = x.chunk(2, -1)
        return torch.cat([x1 * c + x2 * s, -x1 * s + x2 * c], -1)

    def attend(self, q, k, v, first):
        """softmax(scale q k^T) v over the keys from `first` on; all are (T, H, D)."""
        T, H, _ = q.shape
        out, step = torch.empty_like(v), max(1, min(QUERIES, SCORES // (H * T)))
        for a in range(0, T, step):
            b = min(a + step, T)
            start = int(first[a:b].min())
            z = self.scale * torch.einsum("qhd,khd->hqk", q[a:b], k[start:b])
            key = torch.arange(start, b, device=self.device)
            query = torch.arange(a, b, device=self.device)[:, None]
            z = z.masked_fill((key > query) | (key < first[a:b, None]), float("-inf"))
            out[a:b] = torch.einsum("hqk,khd->qhd", z.softmax(-1), v[start:b])
        return out

    def attention(self, l, h, tokens, first_v):
        """Of the normed stream h (T, C). Also returns the values, which later layers may mix in."""
        s, w, T, H = self.s, self.w, len(h), self.s["heads"]
        q, k, raw = ((h @ w[f"h.{l}.attn.{name}.weight"].T).view(T, H, -1)
                     for name in ("c_q", "c_k", "c_v"))
        v = raw
        if s["value_residual"] and first_v is not None:
            lamb = w[f"h.{l}.attn.lamb"][0]
            v = (1 - lamb) * v + lamb * first_v
        if s["attn_lambdas"]:
            a = w[f"h.{l}.attn.lambdas"]
            v = a[0] * v
            if l in self.tables:
                v = v + a[1] * w[f"value_embeds.{self.tables[l]}.weight"][tokens].view(T, H, -1)
        if s["qk_order"] == "norm-first":
            q, k = (self.rotate(rms(x, s["qk_norm_eps"])) for x in (q, k))
        else:
            q, k = (rms(self.rotate(x), s["qk_norm_eps"]) for x in (q, k))
        y = self.attend(q, k, v, self.first_keys(tokens, l))
        if s["attention_gate"]:
            y = y * torch.sigmoid(h[:, :12] @ w[f"h.{l}.attn.gate.weight"].T)[:, :, None]
        return y.reshape(T, -1) @ w[f"h.{l}.attn.c_proj.weight"].T, raw

    def mlp(self, l, h):
        up, down = self.w[f"h.{l}.mlp.c_fc.weight"], self.w[f"h.{l}.mlp.c_proj.weight"]
        return torch.cat([torch.relu(part @ up.T).square() @ down.T for part in h.split(CHUNK)])

    def stream(self, tokens):
        """What the head reads: (T, C)."""
        s, w, L = self.s, self.w, self.s["layers"]
        x = w["wte.weight"][tokens]
        if s["smear"]:
            gate = torch.sigmoid(x[1:, :12] @ w["smear.gate.weight"].view(12, 1))
            x = torch.cat([x[:1], x[1:] + w["smear.lambda"] * gate * x[:-1]])
        if s["embed_norm"]:
            x = rms(x, s["norm_eps"])
        x0, first_v, outs = x, None, {}
        for l in range(L):
            if l in self.left_out:
                continue
            if s["skips"] and l >= L // 2:          # the last of the first half comes first
                x = x + w["skip_weights"][l - L // 2] * outs[L - 1 - l]
            for i, (source, target) in enumerate(self.gated_skips):
                if target == l:
                    x = x + torch.sigmoid(w["skip_gates"][i]) * outs[source]
            if s["x0_mix"]:
                mix = w[f"h.{l}.lambdas"]
                x = mix[0] * x + mix[1] * x0
            if l not in self.no_attention:
                y, v = self.attention(l, rms(x, s["norm_eps"]), tokens, first_v)
                first_v = v if first_v is None else first_v
                x = x + y
            x = x + self.mlp(l, rms(x, s["norm_eps"]))
            outs[l] = x
        if s["backout"] >= 0:
            x = x - w["backout.lambda"] * outs[s["backout"]]
        return rms(x, s["norm_eps"])

    def head(self, x):
        z = x @ self.w["wte.weight" if self.s["head"] == "tied" else "lm_head.weight"].T
        c = self.s["softcap_value"]
        if self.s["softcap"] == "tanh":
            z = c * torch.tanh(z / c)
        if self.s["softcap"] == "sigmoid":
            z = c * torch.sigmoid(4 * z / c)
        return z

    def __call__(self, tokens):
        return self.head(self.stream(tokens.to(self.device)))

    def loss_sum(self, tokens, targets):
        """Summed in double: 50,304 columns, most of them alike, are 1e-5 off in a sum of floats."""
        x, targets = self.stream(tokens.to(self.device)), targets.to(self.device)
        return sum(F.cross_entropy(self.head(a).double(), b, reduction="sum").item()
                   for a, b in zip(x.split(CHUNK), targets.split(CHUNK)))


# ---- validation ----------------------------------------------------------------------------------

def read_tokens(pattern, count):
    """The first `count` tokens of the shards that match, in the order of their names; 0: all."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise Problem(f"--val {pattern}: no such file")
    parts, have = [], 0
    for path in paths:
        with open(path, "rb") as file:
            header = file.read(1024)
            if len(header) < 1024 or struct.unpack("<2i", header[:8]) != (20240520, 1):
                wrong(path, f"a header that starts {header[:8].hex()}", "a token shard")
            there = struct.unpack_from("<i", header, 8)[0]
            want = min(there, count - have) if count else there
            raw = file.read(2 * want)
            if len(raw) < 2 * want:
                wrong(path, f"{len(raw) // 2} tokens", f"{there}, as its header says")
            parts += struct.unpack(f"<{want}H", raw)
            have += want
        if count and have == count:
            break
    if have < count or have < 2:
        raise Problem(f"--val {pattern}: {have} tokens are there, and {max(count, 2)} are needed")
    return torch.tensor(parts, dtype=torch.long)


def validate(c, tokens, device):
    """The mean loss over all tokens but the first, in rows that do not see each other."""
    model = Model(c.weights, c.flags, c.step, device)
    T, n, total = c.flags["val_seq_len"] or c.flags["seq_len"], len(tokens) - 1, 0.0
    said = time.monotonic()
    with torch.no_grad():
        for a in range(0, n, T):                    # the last row may be short
            b = min(a + T, n)
            total += model.loss_sum(tokens[a:b], tokens[a + 1:b + 1])
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"{b} of {n} predictions, loss {total / b:.6f}", file=sys.stderr)
    return total / n


def command_loss(args):
    status = 0
    for path in args.paths:
        c = Checkpoint(path)
        asked = c.flags["val_tokens"] if args.val_tokens is None else args.val_tokens
        pattern, rows = args.val or c.flags["val"], c.flags["table_rows"] or c.flags["vocab"]
        tokens = read_tokens(pattern, asked + 1 if asked else 0)
        if int(tokens.max()) >= rows:
            wrong(f"--val {pattern}", f"token {int(tokens.max())}", f"less than {rows}")
        try:
            loss, (logged, log) = validate(c, tokens, args.device), c.logged_loss()
        except MALFORMED as error:
            raise Problem(f"{path}: flags and tensors do not make a model: {error!r}") from None
        words = f"{path}: step {c.step}: loss {loss:.6f} over {len(tokens) - 1} predictions"
        tolerance = args.tolerance if args.tolerance is not None else 0.005 if c.bf16 else 1e-4
        if asked != c.flags["val_tokens"]:
            print(f"{words}, not compared: the run's are {c.flags['val_tokens'] or 'all'}")
        elif logged is None:
            print(f"{words}, not compared: {log} has no validation of this step")
        elif abs(loss - logged) <= tolerance:       # false of a NaN
            print(f"{words}, logged {logged:.6f}: equal, difference {loss - logged:+.1e}")
        else:
            print(f"{words}, logged {logged:.6f}: NOT EQUAL, difference {loss - logged:+.1e}, "
                  f"tolerance {tolerance:g}")
            status = 1
    return status


# ---- the other commands --------------------------------------------------------------------------

def command_convert(args):
    c = Checkpoint(args.path)
    masters = c.state.get("master", {})
    out = {name: masters.get(name, tensor).float() for name, tensor in c.weights.items()}
    if args.state:
        if not os.path.isdir(args.path):
            wrong(args.path, "weights alone", "a checkpoint, which has the state, with --state")
        for kind in ("m", "v", "grad"):
            out.update({f"{name}.{kind}": x for name, x in c.state.get(kind, {}).items()})
    metadata = dict(c.metadata, format="pt", step=str(c.step),
                    flags=json.dumps(c.flags, separators=(",", ":")))
    temporary = f"{args.out}.{os.getpid()}.tmp"     # no half of a file under the name that is asked
    try:
        save_file({name: x.contiguous() for name, x in out.items()}, temporary, metadata)
        os.replace(temporary, args.out)
    except (OSError, SafetensorError) as error:
        raise Problem(f"{args.out}: {error}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    print(f"{args.out}: step {c.step}, {len(out)} tensors of {sum(x.numel() for x in out.values())}"
          f" fp32 values, {len(masters)} of them masters")
    return 0


def figures(tensor):
    if tensor is None:
        return ["-", "-"]
    x = tensor.double()
    return [f"{x.norm():.4g}", f"{x.abs().max():.4g}"]


def command_table(args):
    c = Checkpoint(args.path)
    kinds = [kind for kind in KINDS[1:] if kind in c.state]
    rows = [["tensor", "shape", "dtype", "norm", "max"]]
    rows[0] += [x for kind in kinds for x in (f"{kind} norm", "max")]
    for name, tensor in c.weights.items():
        shape, dtype = "x".join(map(str, tensor.shape)), str(tensor.dtype).replace("torch.", "")
        rows.append([name, shape, dtype] + figures(tensor))
        rows[-1] += [x for kind in kinds for x in figures(c.state[kind].get(name))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        words = [x.ljust(n) if i < 3 else x.rjust(n) for i, (x, n) in enumerate(zip(row, widths))]
        print("  ".join(words).rstrip())
    bad = sum(int((~x.isfinite()).sum()) for x in c.weights.values())
    print(f"step {c.step}: {sum(x.numel() for x in c.weights.values())} weights in "
          f"{len(c.weights)} tensors{f', {bad} NOT FINITE' if bad else ''}")
    return 0


def main():
    parser = argparse.ArgumentParser(prog="checkpoint", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("loss", help="validation loss, compared with the run's own")
    sub.add_argument("paths", nargs="+", metavar="PATH")
    sub.add_argument("--val")
    sub.add_argument("--val-tokens", type=int)
    sub.add_argument("--tolerance", type=float)
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sub.set_defaults(run=command_loss)
    sub = commands.add_parser("convert", help="one file of fp32 tensors")
    sub.add_argument("path", metavar="PATH")
    sub.add_argument("out", metavar="OUT.safetensors")
    sub.add_argument("--state", action="store_true")
    sub.set_defaults(run=command_convert)
    sub = commands.add_parser("table", help="norms of all tensors")
    sub.add_argument("path", metavar="PATH")
    sub.set_defaults(run=command_table)
    args = parser.parse_args()
    try:
        return args.run(args)
    except (Problem, OSError) as problem:
        sys.exit(f"checkpoint: {problem}")


if __name__ == "__main__":
    sys.exit(main())
