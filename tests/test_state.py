"""What stays on disk: killed, locked, full, foreign and damaged folders; nothing is lost without a word.

The kill test ends a stage at chosen operations on its folder: before, and in the middle of, each write,
rename and removal. The same command must then go on to the same bytes. CI takes some of them; all, in some
twenty minutes: KILLS=all pytest tests/test_state.py -k killed_stage -s; KILLS=60 takes so many of each
"""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, imaginative, make_world, one_thread, refused, run_script, two_processes
from safetensors.torch import load_file, save_file

import lib.jobs
import lib.videos
from lib.checkpoints import Run, fingerprint, load_optimizer, newest_checkpoint, open_run, save_checkpoint
from lib.files import append_jsonl, read_json, read_jsonl, remove_folder, remove_leftovers, write_json
from lib.files import evenly_spaced, write_text
from lib.rows import read_rows
from lib.safety import explain, release_lock, take_lock
from lib.scores import read_results
from model import load_model

WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
TIMES = ("seconds", "rollout", "update")  # of a log's entries
STAGES = ("generate_data", "dift", "grpo4d", "evaluate")


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A checkpoint that often imagines, and a few 4DRL rows."""
    folder = tmp_path_factory.mktemp("state")
    model = imaginative(tiny)
    save_checkpoint(folder / "start", 1, model, {})
    lines = []
    for index, row in enumerate(read_rows(tiny / "data" / "train_imagery.jsonl")):
        raw = {"Type": "turn", "Question": f"Where is box {index}?", "Correct": "ABCD"[index % 4]}
        raw |= {"A": "Left", "B": "Right", "C": "Up", "D": "Down"}
        lines.append(json.dumps(raw | {"frame_paths": row.image_input, "times": row.times}) + "\n")
    (folder / "rl.jsonl").write_text("".join(lines[:4]))
    (folder / "held.jsonl").write_text("".join(lines[4:6]))
    return folder


def command(stage, tiny, world, out):
    """The words of a small run of a stage."""
    few = {
        "generate_data": "TRAIN_CLIPS=3 TEST_CLIPS=2 RL_TRAIN_CLIPS=1 RL_TEST_CLIPS=1 P_OBJECT_CLIP=0.0",
        "dift": f"MODEL={tiny}/base DATA={tiny}/data STEPS=3 SAVE_EVERY=1 EVAL_EVERY=0 TEST_ROWS=2 WARMUP=1"
        " GLOBAL_BATCH=2 MICRO_BATCH=2 LOG_EVERY=1",
        "grpo4d": f"MODEL={world}/start DATA={world}/rl.jsonl HOLDOUT={world}/held.jsonl SINGLES= STEPS=3"
        " SAVE_EVERY=1 GLOBAL_BATCH=2 G=2 MAX_NEW=12 LR=1e-4 WARMUP=1 EVAL_EVERY=0",
        "evaluate": f"MODEL={world}/start DATA={world}/held.jsonl BATCH=1 MAX_NEW=12",
    }
    return [*few[stage].split(), f"OUT={out}"]


def in_child(work):
    """Calls `work` in a forked process, silently -> its exit code; a real kill costs no start of Python."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = 0 if stop.code in (0, None) else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_stage(stage, words):
    """A stage in this process; clips are made one after the other, so that a kill ends all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.jobs, "run_jobs", lambda jobs, do, workers: [do(job) for job in jobs])
        run_script(patch, f"{stage}.py", *words)


def watch(out, on_change):
    """Calls on_change(event, path, flags) before each operation that changes something in `out`."""

    def hook(event, args):
        if event not in CHANGES:
            return
        flags = args[2] if event == "open" else 0
        path = str(args[0])
        is_change = event != "open" or flags & WRITING
        if is_change and path.startswith(str(out)):
            on_change(event, path, flags)

    sys.addaudithook(hook)


def count_changes(stage, words, out, note):
    """Runs a stage to its end -> [event] of its changes."""

    def work():
        events = []
        watch(out, lambda event, path, flags: events.append(event))
        run_stage(stage, words)
        note.write_text(json.dumps(events))

    assert in_child(work) == 0, stage
    return json.loads(note.read_text())


def kill_at(number, half, stage, words, out):
    """Runs a stage that ends, as kill -9 would end it, before its change of this number, or in it."""

    def work():
        left = [number]

        def on_change(event, path, flags):
            left[0] -= 1
            if left[0] >= 0:
                return
            if half:
                # what a kill in the middle of a write leaves: a file with the beginning of a line
                left[0] = math.inf
                file = os.open(path, flags, 0o644)
                os.write(file, b'{"st')
            os.kill(os.getpid(), signal.SIGKILL)

        watch(out, on_change)
        run_stage(stage, words)

    return in_child(work)


def state_of(out):
    """{relative path: bytes} of a folder, without the times in logs and pages and what no stage reads."""
    files = {}
    for path in sorted(Path(out).rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or path.name in (".lock", "report.html"):
            continue
        data = path.read_bytes()
        if path.name == "log.jsonl":
            entries = [json.loads(line) for line in data.splitlines()]
            data = [{key: entry[key] for key in entry if key not in TIMES} for entry in entries]
        files[name] = data
    return files


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_in_the_same_bytes(stage, tiny, world, tmp_path):
    # OUT stands in the files, so that all runs have the same one
    out = tmp_path / "out"
    words = command(stage, tiny, world, out)
    events = count_changes(stage, words, out, tmp_path / "note")
    whole = state_of(out)
    kills = [(number, False) for number in range(len(events))]
    kills += [(number, True) for number, event in enumerate(events) if event == "open"]
    count = os.environ.get("KILLS", "4")
    if count != "all":
        kills = evenly_spaced(kills[1:], int(count))
    failed, different = [], []
    for number, half in kills:
        shutil.rmtree(out)
        assert kill_at(number, half, stage, words, out) == -signal.SIGKILL
        if in_child(partial(run_stage, stage, words)) != 0:
            failed.append((number, half, events[number]))
        elif state_of(out) != whole:
            after = state_of(out)
            names = [name for name in whole.keys() | after.keys() if whole.get(name) != after.get(name)]
            different.append((number, half, events[number], names))
    print(f"{stage}: {len(kills)} kills, {len(failed)} failed reruns, {len(different)} different ends")
    assert not failed and not different, (failed, different)


# ---------------------------------------------------------------- NaN


@pytest.mark.parametrize("stage", ["dift", "grpo4d"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_gradient_stops_a_run_before_anything_is_saved(
    stage, value, tiny, world, tmp_path, monkeypatch
):
    """Step 3 has a broken gradient: the checkpoint of step 2 is named and stays, with two lines of log."""
    norms = iter([1.0, 1.0, value])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: torch.tensor(next(norms)))
    words = command(stage, tiny, world, tmp_path / "out")
    good = tmp_path / "out" / "step_000002"
    refused(lambda: run_stage(stage, words), f"gnorm {value}", "step 3", str(good), "lower LR")
    assert newest_checkpoint(tmp_path / "out") == good
    assert [entry["step"] for entry in read_jsonl(tmp_path / "out" / "log.jsonl")] == [1, 2]


def test_a_broken_loss_or_weight_is_never_written(tiny, tmp_path):
    run = Run(tmp_path, 0, None, {}, tmp_path / "log.jsonl")
    for entry in ({"loss": math.nan, "ce": math.nan}, {"loss": -math.inf}, {"loss": 1.0, "gnorm": math.inf}):
        refused(partial(run.write, {"step": 7, **entry}), "step 7", "no checkpoint was written")
    run.write({"step": 7, "loss": 1.0, "retrieval": None, "kl": math.inf})
    model = load_model(tiny / "base", K=4, pooling="grid")
    kept = save_checkpoint(tmp_path, 1, model, {})
    with torch.no_grad():
        model.qwen.get_input_embeddings().weight[3, 3] = math.nan
    refused(lambda: save_checkpoint(tmp_path, 2, model, {}), "embed_tokens", "after step 2", str(kept))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step_000001"]


# ---------------------------------------------------------------- a folder that is not ours


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize(
    "name", ["step_000010/notes.txt", "step_5/config.json", "eval/mine.txt", "log.jsonl", "after/x"]
)
def test_training_leaves_a_foreign_folder_alone(name, resume, tiny, world, tmp_path):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}')
    for stage in ("dift", "grpo4d"):
        words = [*command(stage, tiny, world, tmp_path / "out"), f"RESUME={resume}"]
        refused(partial(run_stage, stage, words), "was not written by this script", "set another OUT")
    assert file.read_text() == '{"mine": 1}'


def test_a_stage_leaves_another_stages_run_alone(tiny, world, tmp_path):
    out = tmp_path / "out"
    model = load_model(tiny / "base", K=4, pooling="grid")
    save_checkpoint(out, 1, model, {"MODEL": "a", "K": 4, "W_CE": 1.0, "W_SIM": 1.0, "COT": "imagery"})
    words = [*command("grpo4d", tiny, world, out), "RESUME=never"]
    refused(lambda: run_stage("grpo4d", words), "another stage", "set another OUT")
    assert newest_checkpoint(out).name == "step_000001"


def test_answers_of_something_else_are_left_alone(tiny, world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text('{"mine": 1}\n')
    refused(lambda: run_stage("evaluate", command("evaluate", tiny, world, out)), "not written by evaluate")
    assert (out / "results.jsonl").read_text() == '{"mine": 1}\n'


def test_files_beside_a_new_run_do_not_matter(tmp_path):
    (tmp_path / "stdout.txt").write_text("mine")
    assert open_run(tmp_path, "never", {"LR": 1}, ["LR"]).start == 0
    release_lock(tmp_path)


# ---------------------------------------------------------------- the lock, and a cache that is shared


def test_a_folder_has_one_holder_and_a_dead_one_is_replaced(tmp_path):
    hold = f"import time; from lib.safety import take_lock; take_lock({str(tmp_path)!r}); print('held'); "
    hold += "import sys; sys.stdout.flush(); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], env=one_thread(), stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    refused(lambda: take_lock(tmp_path), str(tmp_path), f"process {holder.pid} on ", " since 20", "OUT")
    holder.kill()
    holder.wait()
    take_lock(tmp_path)
    take_lock(tmp_path)  # it is ours already
    release_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_is_refused(stage, tiny, world, tmp_path):
    out = tmp_path / "out"
    words = command(stage, tiny, world, out)
    take_lock(out)
    code = in_child(partial(run_stage, stage, words))
    release_lock(out)
    assert code == 3 and list(out.iterdir()) == []


def test_two_processes_lock_once(tiny, tmp_path):
    words = command("dift", tiny, tmp_path, tmp_path / "out")
    two_processes(ROOT / "dift.py", *words, "TEST_ROWS=0", "PARALLEL=fsdp")
    assert newest_checkpoint(tmp_path / "out").name == "step_000003"
    assert not (tmp_path / "out" / ".lock").exists()


def test_the_loser_of_a_race_uses_what_the_winner_made(tmp_path, monkeypatch):
    """Four runs decode one video at once; all are given the same frames, and nothing is left over."""
    from PIL import Image

    def frames(path, fps, most):
        for number in range(5):
            time.sleep(0.01)
            yield Image.new("RGB", (8, 8), (10 * number, 0, 0)), float(number)

    monkeypatch.setattr(lib.videos, "decode_frames", frames)
    (tmp_path / "a.mp4").write_bytes(b"x")
    read = partial(lib.videos.frames_on_disk, tmp_path / "a.mp4", tmp_path / "cache", 1.0, 50)
    with ThreadPoolExecutor(4) as pool:
        found = [run.result() for run in [pool.submit(read) for _ in range(4)]]
    assert all(one == found[0] for one in found) and len(found[0][0]) == 5 and found[0][1] == ""
    assert len(list((tmp_path / "cache").iterdir())) == 1


# ---------------------------------------------------------------- the system says no


def test_errors_of_the_system_are_a_sentence():
    for code in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EDQUOT):
        assert os.strerror(code) in explain(OSError(code, os.strerror(code), "out/x"))
        assert "out/x: " in explain(OSError(code, os.strerror(code), "out/x"))
    assert "No space" in explain(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert "goes on" in explain(KeyboardInterrupt())
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "none"), OSError("odd")):
        assert explain(error) == ""  # a fault of the program: its traceback helps


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line(stage, tiny, world, tmp_path):
    """No file may grow beyond 300 bytes, as on a full disk; then there is room, and the run goes on."""
    out = tmp_path / "out"
    script = [sys.executable, str(ROOT / f"{stage}.py"), *command(stage, tiny, world, out)]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (300, 300))
    done = subprocess.run(
        script, cwd=ROOT, env=one_thread(), capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1] and "goes on" in done.stderr.splitlines()[-1]
    assert in_child(partial(run_stage, stage, command(stage, tiny, world, out))) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_out_that_is_a_file_is_one_line(stage, tiny, world, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(lambda: run_stage(stage, command(stage, tiny, world, tmp_path / "out")), "is a file", "set OUT")


@pytest.mark.parametrize("constant", ["OUT", "DATA", "MODEL"])
@pytest.mark.parametrize("stage", STAGES)
def test_odd_names_are_a_sentence_and_nothing_waits(stage, constant, tiny, world, tmp_path, monkeypatch):
    """Long names, pipes, devices, links to nothing and to themselves, line breaks, no UTF-8."""
    if stage == "generate_data" and constant != "OUT":
        constant, words = "VIDEOS", ["SOURCE=videos"]
    else:
        words = []
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkfifo("pipe.jsonl")
    Path("broken").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("two\nlines.jsonl").write_text("{")
    Path("empty.jsonl").write_text("")
    names = [
        "x" * 300,
        "x/" * 2500,
        "pipe",
        "pipe.jsonl",
        "broken",
        "loop",
        "/dev/null",
        "/dev/zero",
        "a\udcff",
    ]
    names += ["two\nlines.jsonl", "empty.jsonl"]
    names += [""] if constant == "OUT" and stage != "evaluate" else []

    def hang(*_):
        raise AssertionError(f"{name[:80]!r} is waited for")

    for name in names:
        signal.signal(signal.SIGALRM, hang)
        signal.alarm(60)
        try:
            # of two words for one constant the last counts
            run_stage(stage, [*command(stage, tiny, world, "out"), *words, f"{constant}={name}"])
            sentence = "taken"
        except SystemExit as stop:
            sentence = stop.code
        except OSError as error:
            sentence = explain(error)
        finally:
            signal.alarm(0)
        assert sentence.endswith(".") and sentence.isprintable() and len(sentence) < 400, (
            name[:80],
            sentence,
        )


@pytest.mark.parametrize("stage", ["dift", "grpo4d", "evaluate"])
def test_ctrl_c_is_one_line(stage, tiny, world, tmp_path):
    words = [*command(stage, tiny, world, tmp_path / "out")]
    words += ["LIMIT=0"] if stage == "evaluate" else ["STEPS=100000"]
    if stage == "evaluate":
        words += [f"DATA={tiny}/data/train_imagery.jsonl", "MAX_NEW=2000"]
    program = [sys.executable, "-u", str(ROOT / f"{stage}.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(program, cwd=ROOT, env=one_thread(), **pipes)
    begun = "answers are there" if stage == "evaluate" else "step     1"
    for line in run.stdout:
        if begun in line:
            break
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and "Traceback" not in errors, errors
    last = errors.splitlines()[-1]
    assert last == "Stopped. What is finished is kept; the same command goes on from there."


def end_at_two(number):
    """A job whose worker is killed."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_one_line():
    refused(lambda: lib.jobs.run_jobs([1, 2, 3], end_at_two, 2), "worker process was killed", "goes on")


def test_workers_end_with_torchrun(tmp_path):
    """kill -9 of torchrun: its two processes are gone within seconds."""
    (tmp_path / "script.py").write_text(
        "import os, time\nfrom lib.distributed import init_distributed\nrank, _, _ = init_distributed()\n"
        f"open({str(tmp_path)!r} + f'/{{rank}}.pid', 'w').write(str(os.getpid()))\ntime.sleep(120)\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    parent = subprocess.Popen([*run, tmp_path / "script.py"], cwd=ROOT, env=one_thread())
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    until(lambda: all(file.is_file() and file.read_text() for file in files), 90)
    workers = [int(file.read_text()) for file in files]
    parent.kill()
    parent.wait()
    until(lambda: not any(is_running(worker) for worker in workers), 20)


def until(condition, seconds):
    """Waits for a condition, at most so long."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.1)


def is_running(process):
    """Whether a process lives; one that only waits to be buried does not."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# ---------------------------------------------------------------- checkpoints that cannot be loaded


def change_config(part=None, **changes):
    """A change of config.json, or of one of its parts."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (config[part] if part else config).update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(function):
    """A change of the weights {name: tensor}."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(function(tensors), folder / "model.safetensors", metadata={"format": "pt"})

    return change


def replace_bytes(name, function):
    """A change of a file's bytes."""

    def change(folder):
        (folder / name).write_bytes(function((folder / name).read_bytes()))

    return change


def poison(tensors):
    """One weight becomes NaN."""
    name = sorted(tensors)[4]
    tensors[name].view(-1)[0] = math.nan
    return tensors


def split(index):
    """A change that cuts the weights into shards, one of which is missing."""

    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def overflow(tensors):
    """Finite weights whose products are not."""
    return {name: x.fill_(3e38) if "down_proj" in name else x for name, x in tensors.items()}


def without_sizes(folder):
    """The library would make a network of 72 billion weights."""
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]
    (folder / "config.json").write_text(json.dumps(config))


SHARDS = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n"
ROPE = {"mrope_section": [2, 3, 3], "rope_type": "default"}  # of tests/helpers.py
BROKEN = {
    "config torn": (replace_bytes("config.json", lambda data: data[:300]), "config.json is damaged"),
    "config empty": (replace_bytes("config.json", lambda data: b""), "config.json is damaged"),
    "config list": (replace_bytes("config.json", lambda data: b"[1]"), "no JSON object"),
    "config deep": (replace_bytes("config.json", lambda data: b"[" * 100_000), "config.json is damaged"),
    "config BOM": (replace_bytes("config.json", lambda data: b"\xef\xbb\xbf" + data), "byte-order mark"),
    "config null": (change_config(text_config=None), "text_config is no object"),
    "cut early": (replace_bytes("model.safetensors", lambda data: data[:500]), "cut or damaged"),
    "cut late": (replace_bytes("model.safetensors", lambda data: data[:-20]), "cut or damaged"),
    "no bytes": (replace_bytes("model.safetensors", lambda data: b""), "cut or damaged"),
    "pointer": (replace_bytes("model.safetensors", lambda data: POINTER), "git lfs pull"),
    "NaN": (change_tensors(poison), "NaN or infinity"),
    "integers": (change_tensors(lambda t: {name: x.int() for name, x in t.items()}), "quantised"),
    "awq": (change_config(quantization_config={"quant_method": "awq"}), "quantised weights (awq)"),
    "shards": (split(SHARDS), "model-00002-of-00002"),
    "index": (split("{"), "index.json is damaged"),
    "vocabulary": (change_config("text_config", vocab_size=300), "vocab_size=300"),
    "layers": (change_config("text_config", num_hidden_layers=1), "num_hidden_layers=1"),
    "depth": (change_config("vision_config", depth=1), "depth=1"),
    "patches": (change_config("vision_config", patch_size=14), "another shape"),
    "heads": (change_config("text_config", num_attention_heads=0), "do not fit this network"),
    "no rope": (change_config("text_config", rope_parameters=None), "mrope_section"),
    "default sizes": (without_sizes, "does not say vocab_size"),
    "rope": (change_config("text_config", rope_parameters=ROPE | {"rope_theta": math.nan}), "rope_theta"),
    "epsilon": (change_config("text_config", rms_norm_eps=-10.0), "rms_norm_eps"),
    "sliding": (change_config("text_config", layer_types=["sliding_attention"] * 2), "cannot run"),
    "huge": (change_tensors(overflow), "output is NaN or infinite"),
    "too many latents": (change_config(latent_size=10**9), "latent_size", "4096"),
    "imagery": (change_config(imagery="foo"), "imagery"),
    "half a character": (change_config(prompt_suffix="\ud800"), "prompt_suffix"),
    "unused": (change_tensors(lambda t: {**t, "foo.bar": torch.zeros(3)}), "no place for", "foo.bar"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "tokenizer cut": (replace_bytes("tokenizer.json", lambda data: data[:999]), "tokenizer cannot be read"),
    "tokenizer empty": (replace_bytes("tokenizer.json", lambda data: b"{}"), "tokenizer cannot be read"),
    "pooling": (change_config(latent_pooling="foo"), "foo"),
    "size as text": (change_config(latent_size="4"), "latent_size"),
    "negative size": (change_config(latent_size=-4), "latent_size"),
    "norm": (change_config(latent_norm=math.nan), "latent_norm"),
    "pixels": (change_config(min_pixels=9000), "MIN_PIXELS=9000", "MAX_PIXELS"),
    "latent id": (change_config(latent_token_id=9999), "latent_token_id=9999"),
}
for prefix in ("module.", "_orig_mod.", "base_model.model."):
    renamed = change_tensors(lambda t, prefix=prefix: {prefix + name: x for name, x in t.items()})
    BROKEN[prefix] = (renamed, prefix)


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_loaded_is_a_sentence(name, world, tmp_path):
    change, *expected = BROKEN[name]
    shutil.copytree(world / "start" / "step_000001", tmp_path / "step_000002")
    change(tmp_path / "step_000002")
    refused(lambda: load_model(tmp_path / "step_000002"), *expected)


def test_a_damaged_newest_checkpoint_names_the_one_before(world, tmp_path):
    for step in (1, 2):
        shutil.copytree(world / "start" / "step_000001", tmp_path / f"step_{step:06d}")
    replace_bytes("model.safetensors", lambda data: data[:-20])(tmp_path / "step_000002")
    refused(lambda: load_model(tmp_path), "delete step_000002", f"{tmp_path}/step_000001")
    shutil.rmtree(tmp_path / "step_000002")
    assert load_model(tmp_path).K == 4


def test_the_head_is_what_is_stored_whatever_the_flags_say(tmp_path):
    """Tied weights stay tied and a head of its own stays its own, also once saved and read again."""
    for tied in (True, False):
        base = make_world(tmp_path / str(tied), tied=tied) / "base"
        own = load_file(base / "model.safetensors").get("lm_head.weight")
        assert (own is None) == tied
        for flag in (True, False):
            for part in (None, "text_config"):
                change_config(part, tie_word_embeddings=flag)(base)
                try:
                    model = load_model(base, K=4, pooling="grid")
                except SystemExit as stop:
                    assert "lm_head" in stop.code or "tie_word_embeddings" in stop.code
                    continue
                head = model.qwen.lm_head.weight
                assert (head is model.qwen.get_input_embeddings().weight) == tied
                again = load_model(save_checkpoint(tmp_path / "saved", 1, model, {}))
                assert torch.equal(again.qwen.lm_head.weight, head)


def test_a_name_of_the_hub_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = "Qwen/Qwen2.5-VL-3B-Instruct"
    download = f"hf download {hub} --local-dir Qwen2.5-VL-3B-Instruct"
    refused(lambda: load_model(hub, K=4), "must be a folder", download)
    refused(lambda: load_model("out/dift"), "train one with dift.py")


def test_moments_that_are_not_the_weights_are_refused(tiny, tmp_path):
    model = load_model(tiny / "base", K=4, pooling="grid")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    for weight in trained:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    folder = save_checkpoint(tmp_path, 1, model, {}, optimizer)
    file = folder / "optimizer.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if name.endswith("norm.weight.exp_avg"))
    cases = {
        "lacks": {key: x for key, x in whole.items() if key != name},
        "fits no trained weight": {**whole, name: whole[name][:3].clone()},
        "foo.exp_avg": {**whole, "foo.exp_avg": torch.zeros(2)},
        "NaN": {**whole, name: whole[name] * math.nan},
    }
    for expected, tensors in cases.items():
        save_file(tensors, file)
        refused(lambda: load_optimizer(folder, model, optimizer), str(file), expected)
    file.write_bytes(file.read_bytes()[:-9])
    refused(lambda: load_optimizer(folder, model, optimizer), str(file), "cut or damaged")


# ---------------------------------------------------------------- other rows, damaged files


def test_a_run_goes_on_with_the_same_rows_only(tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny / "data", data)
    words = [*command("dift", tiny, tmp_path, tmp_path / "out"), f"DATA={data}", "TEST_ROWS=0"]
    run_stage("dift", words)
    file = data / "train_imagery.jsonl"
    before = file.read_text()
    file.write_text(before.replace("Pan Left", "Pan Up"))
    refused(lambda: run_stage("dift", [*words, "STEPS=4"]), "other rows than DATA=", "RESUME=never")
    # what an earlier version of the code wrote has no fingerprint: it goes on
    config = newest_checkpoint(tmp_path / "out") / "config.json"
    record = json.loads(config.read_text())
    assert record["run"].pop("data_content")
    config.write_text(json.dumps(record))
    run_stage("dift", [*words, "STEPS=4"])
    record = read_json(newest_checkpoint(tmp_path / "out") / "config.json")["run"]
    assert record["data_content"] == fingerprint(read_rows(file))


def test_damaged_state_is_a_sentence(tiny, world, tmp_path):
    out = tmp_path / "out"
    words = command("evaluate", tiny, world, out)
    run_stage("evaluate", words)
    results = (out / "results.jsonl").read_text()
    first, second = results.splitlines()
    damages = ["[1]\n", "{}\n", first.replace('"row": 0', '"row": 77') + "\n", "{{}\n", first[:90] + "\n"]
    damages += [first.replace('"text": "', '"text": ["') + "\n", '{"row": "a"}\n']
    for damage in damages:
        (out / "results.jsonl").write_text(damage + second + "\n")
        refused(lambda: run_stage("evaluate", words), "results.jsonl", "damaged", "delete")
    (out / "results.jsonl").write_text(results)
    for damage in ("", "[]", '{"a"', "\x00"):
        (out / "settings.json").write_text(damage)
        refused(lambda: run_stage("evaluate", words), "settings.json is damaged", f"delete {out}")
    shutil.rmtree(out)
    # the summary of a control beside it is left out
    (tmp_path / "out_video-none").mkdir()
    (tmp_path / "out_video-none" / "summary.json").write_text('{"settings"')
    assert in_child(partial(run_stage, "evaluate", words)) == 0


def test_damaged_data_is_made_again_or_named(tiny, world, tmp_path):
    out = tmp_path / "out"
    words = command("generate_data", tiny, world, out)
    assert in_child(partial(run_stage, "generate_data", words)) == 0
    whole = state_of(out)
    clip = next((out / "processed_data").glob("*/rows.json"))
    for damage in ("", '{"rows": [', '{"rows": [1], "dropped": {}}', "[]"):
        clip.write_text(damage)
        (out / "meta.json").write_text('{"torn')
        assert in_child(partial(run_stage, "generate_data", words)) == 0
        assert state_of(out) == whole
    # a constant that the folder does not know is newer than it, and had its default there
    constants = json.loads((out / "constants.json").read_text())
    del constants["SWING"]
    (out / "constants.json").write_text(json.dumps(constants))
    refused(lambda: run_stage("generate_data", [*words, "SWING=10"]), "another SWING", "set OUT")
    release_lock(out)
    assert in_child(partial(run_stage, "generate_data", words)) == 0
    (out / "constants.json").write_text('{"SEED"')
    refused(lambda: run_stage("generate_data", words), "constants.json is damaged", "set OUT")
    release_lock(out)


def test_files_appear_whole_and_leftovers_go(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})

    def full(*given):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError):
            write_text(tmp_path / "a.json", "new")
    assert read_json(tmp_path / "a.json") == {"old": 1} and len(list(tmp_path.iterdir())) == 1
    append_jsonl(tmp_path / "log.jsonl", [{"step": 1}])
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2')
    assert read_jsonl(tmp_path / "log.jsonl") == [{"step": 1}]
    (tmp_path / "folder").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *given, **named: None)  # killed after the renaming
        remove_folder(tmp_path / "folder")
    (tmp_path / "a.json.0123.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "log.jsonl"]
    assert read_results(tmp_path / "none.jsonl") == {}
