import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.devices import xla_flags

from jaxmoe.errors import UserError
from jaxmoe.run.checkpoints import Checkpoints


def state_of(step):
    """A state whose every value tells its step, with the containers that optimisers use."""
    params = {"layers": ({"w": jnp.full((5, 7, 3), float(step))}, {"v": jnp.full((11,), step, jnp.bfloat16)})}
    optimizer = optax.partition(
        {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, {"layers": ({"w": "adam"}, {"v": "sgd"})}
    )
    filled = jax.tree.map(lambda x: jnp.full_like(x, step), optimizer.init(params))
    return {"params": params, "optimizer": filled, "step": jnp.int32(step)}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_is_of_step(state, step):
    for leaf in jax.tree.leaves(state):
        assert (np.asarray(leaf, np.float64) == step).all()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def saved(folder):
    """Checkpoints of steps 10 and 20."""
    checkpoints = Checkpoints(folder, keep=2)
    for step in (10, 20):
        checkpoints.save(step, state_of(step), {"position": [step, {"file": "ü"}]})
    checkpoints.close()
    return folder


def run(program, *arguments, prefix=()):
    command = [*prefix, sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_what_is_restored_is_what_was_saved(saved):
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.latest() == 20
    for step in (10, 20):
        want = state_of(step)
        state, extra = checkpoints.restore(step, abstract(want))
        assert jax.tree.structure(state) == jax.tree.structure(want)
        assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, want)
        assert_is_of_step(state, step)
        assert extra == {"position": [step, {"file": "ü"}]}
    checkpoints.close()


def test_leaves_of_dots_are_not_read(saved):
    checkpoints = Checkpoints(saved, keep=None)
    wanted = abstract(state_of(20))
    wanted["optimizer"] = jax.tree.map(lambda _: ..., wanted["optimizer"])
    state, _ = checkpoints.restore(20, wanted)
    assert set(jax.tree.leaves(state["optimizer"])) == {...}
    assert_is_of_step(state["params"], 20)
    checkpoints.close()


def test_only_the_newest_are_kept(folder):
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 3, 10):
        checkpoints.save(step, state_of(step), {})
        checkpoints.wait()
    assert checkpoints.steps() == [3, 10]
    assert sorted(entry.name for entry in folder.iterdir()) == ["10", "3"]
    checkpoints.close()


def test_saving_a_step_again_is_nothing(saved):
    checkpoints = Checkpoints(saved, keep=2)
    checkpoints.save(20, state_of(99), {})
    checkpoints.save(30, state_of(30), {})
    checkpoints.save(30, state_of(99), {})
    assert_is_of_step(checkpoints.restore(20, abstract(state_of(20)))[0], 20)
    assert_is_of_step(checkpoints.restore(30, abstract(state_of(30)))[0], 30)
    checkpoints.close()


def test_a_training_step_may_take_the_buffers_at_once(folder):
    checkpoints = Checkpoints(folder, keep=1)
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jnp.zeros((1500, 1000)), "half": jnp.zeros((1000, 700), jnp.bfloat16), "step": jnp.int32(0)}
    state = advance(state)  # numbers that the program made itself, whose buffers can be reused
    for step in range(1, 6):
        checkpoints.save(step, state, {})
        for _ in range(4):
            state = advance(state)
        jax.block_until_ready(state)
        assert_is_of_step(checkpoints.restore(step, abstract(state))[0], 4 * step - 3)
    checkpoints.close()


def test_leftovers_never_count_and_go_at_the_next_start_of_a_writer(saved):
    for name in ("30.orbax-checkpoint-tmp", "5.deleting", "007", "notes"):
        shutil.copytree(saved / "20", saved / name)
    reader = Checkpoints(saved, keep=None)
    assert reader.steps() == [10, 20]
    assert (saved / "30.orbax-checkpoint-tmp").exists()
    reader.close()
    writer = Checkpoints(saved, keep=2)
    assert sorted(entry.name for entry in saved.iterdir()) == ["007", "10", "20", "notes"]
    writer.save(30, state_of(30), {})
    writer.close()
    assert writer.steps() == [20, 30]


def test_a_reader_writes_nothing(saved):
    reader = Checkpoints(saved, keep=None)
    with pytest.raises(ValueError, match="opened for reading"):
        reader.save(30, state_of(30), {})
    reader.close()
    assert reader.steps() == [10, 20]
    with pytest.raises(ValueError, match="keep must be at least 1, found 0"):
        Checkpoints(saved, keep=0)


def test_a_step_that_is_not_there(saved):
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(UserError, match="no checkpoint of step 15, there are: 10, 20"):
        checkpoints.restore(15, abstract(state_of(15)))
    checkpoints.close()


def test_missing_and_shortened_files_are_named_with_the_remedy(saved, tmp_path):
    files = [path.relative_to(saved / "20") for path in (saved / "20").rglob("*") if path.is_file()]
    assert len(files) > 5
    for number, name in enumerate(files):
        if name.name == "_FILES.json":
            continue
        damaged = tmp_path / f"damaged{number}"
        shutil.copytree(saved, damaged)
        (damaged / "20" / name).unlink() if number % 2 else (damaged / "20" / name).write_bytes(b"")
        checkpoints = Checkpoints(damaged, keep=2)
        with pytest.raises(UserError) as caught:
            checkpoints.restore(checkpoints.latest(), abstract(state_of(20)))
        checkpoints.close()
        message = str(caught.value)
        assert message.startswith(f"{damaged}/20: this checkpoint cannot be read ({name.as_posix()} ")
        assert message.endswith("delete that folder to resume from step 10")
        assert "\n" not in message


def test_a_flipped_bit_in_any_file_is_found(saved):
    """Most of them would be restored as other numbers, in silence."""
    for path in sorted(path for path in (saved / "20").rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1} if whole else ():
            flipped = bytearray(whole)
            flipped[place] ^= 0x10
            path.write_bytes(flipped)
            checkpoints = Checkpoints(saved, keep=2)
            with pytest.raises(
                UserError, match=r"cannot be read \(.*delete that folder to resume from step 10"
            ):
                checkpoints.restore(20, abstract(state_of(20)))
            checkpoints.close()
        path.write_bytes(whole)


def test_an_inventory_without_checksums_still_serves(saved):
    inventory = saved / "20" / "_FILES.json"
    listed = json.loads(inventory.read_text())
    assert all(crc == zlib.crc32((saved / "20" / name).read_bytes()) for name, (_, crc) in listed.items())
    inventory.write_text(json.dumps({name: size for name, (size, _) in listed.items()}))
    checkpoints = Checkpoints(saved, keep=2)
    assert_is_of_step(checkpoints.restore(20, abstract(state_of(20)))[0], 20)
    (saved / "20" / "_CHECKPOINT_METADATA").write_bytes(b"")
    with pytest.raises(UserError, match=r"_CHECKPOINT_METADATA has 0 of \d+ bytes"):
        checkpoints.restore(20, abstract(state_of(20)))
    checkpoints.close()


@pytest.mark.parametrize("change", ["shape", "more", "fewer"])
def test_a_sound_checkpoint_of_another_model_is_not_called_damaged(saved, change):
    wanted = abstract(state_of(20))
    layers = wanted["params"]["layers"]
    leaf = layers[1]["v"]
    if change == "shape":
        layers[1]["v"] = jax.ShapeDtypeStruct((13,), leaf.dtype, sharding=leaf.sharding)
        told = r"found \[11\] at params\.layers\.1\.v, expected \[13\]"
    elif change == "more":
        wanted["params"]["layers"] = (*layers, {"u": leaf})
        told = r"found nothing at params\.layers\.2\.u, expected \[11\]"
    else:
        wanted["params"]["layers"] = layers[:1]
        told = r"found \[11\] at params\.layers\.1\.v, expected nothing"
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(UserError, match=f"another model than the run's: {told}: put back what model.path"):
        checkpoints.restore(20, wanted)
    checkpoints.close()


def test_damage_that_only_orbax_can_see(saved):
    (saved / "10" / "_FILES.json").unlink()
    manifest = bytearray((saved / "10" / "extra" / "metadata").read_bytes())
    (saved / "10" / "extra" / "metadata").write_bytes(manifest[:-3])
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(UserError) as caught:
        checkpoints.restore(10, abstract(state_of(10)))
    assert str(caught.value).endswith("delete that folder to start from the beginning")
    checkpoints.close()


def test_a_fault_in_the_state_is_not_blamed_on_the_disk(saved):
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(Exception, match="object") as caught:
        checkpoints.save(30, {"w": object()}, {})
    assert not isinstance(caught.value, UserError)
    checkpoints.save(40, state_of(40), {})
    checkpoints.close()
    assert checkpoints.steps() == [20, 40]


SHARDED = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from pathlib import Path
    from jaxmoe.run.checkpoints import Checkpoints

    def mesh(*shape):
        devices = np.array(jax.devices()[: np.prod(shape)])
        return jax.sharding.Mesh(devices.reshape(shape), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    want = jnp.arange(8 * 12.0).reshape(8, 12)
    first = NamedSharding(mesh(4, 2), PartitionSpec("a", "b"))
    replicated = NamedSharding(mesh(4, 2), PartitionSpec())
    columns = NamedSharding(mesh(2, 3), PartitionSpec(None, ("a", "b")))
    rows = NamedSharding(mesh(8, 1), PartitionSpec("a"))
    checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
    state = {"w": jax.device_put(want, first), "r": jax.device_put(want, replicated)}
    checkpoints.save(1, state, {})
    for sharding in (first, replicated, columns, rows):
        leaf = jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=sharding)
        wanted = {"w": leaf, "r": leaf}
        state, _ = checkpoints.restore(1, wanted)
        for leaf in state.values():
            assert leaf.sharding == sharding
            np.testing.assert_array_equal(leaf, want)
    checkpoints.close()
    print("equal")
"""


def test_restores_to_another_sharding(folder):
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(8)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), folder],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert (done.stdout, done.returncode) == ("equal\n", 0), done.stderr


ENDLESS = """
    import sys
    from pathlib import Path
    import jax.numpy as jnp
    from jaxmoe.run.checkpoints import Checkpoints

    checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
    step = checkpoints.latest() or 0
    while True:
        step += 1
        state = {"w": jnp.full((1500, 1000), float(step)), "v": jnp.full((300,), float(step))}
        checkpoints.save(step, state, {"step": step})
        print(step, flush=True)
"""


def test_kill_9_at_any_moment_of_a_save_leaves_a_valid_checkpoint(folder):
    delays = random.Random(0)
    newest = 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(ENDLESS), folder],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        ) as child:
            assert child.stdout is not None
            begun = [int(child.stdout.readline()) for _ in range(3)]
            time.sleep(delays.uniform(0.0, 0.15))
            child.send_signal(signal.SIGKILL)
            begun += [int(line) for line in child.stdout.read().split()]
        checkpoints = Checkpoints(folder, keep=2)
        latest = checkpoints.latest()
        # The save before the last one that began had been waited for.
        assert latest is not None
        assert begun[-1] - 1 <= latest <= begun[-1] + 1
        assert latest > newest
        newest = latest
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = {"w": (1500, 1000), "v": (300,)}
        wanted = {k: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=single) for k, shape in shapes.items()}
        checkpoints.wait()  # a third one is left where the kill came before its deletion
        for step in checkpoints.steps():
            state, extra = checkpoints.restore(step, wanted)
            assert_is_of_step(state, step)
            assert extra == {"step": step}
        checkpoints.close()
        assert all(entry.name.isdigit() for entry in folder.iterdir())


FULL = """
    import resource, shutil, sys, types
    from pathlib import Path
    import jax
    from jaxmoe.run.checkpoints import Checkpoints
    from jaxmoe.errors import UserError

    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    noise = lambda step, size: {"w": jax.random.normal(jax.random.key(step), (size,))}
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(10, noise(10, 100), {"step": 10})
    checkpoints.wait()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "claim-room" in sys.argv:  # as when another program fills the disk in the meantime
        shutil.disk_usage = lambda _: types.SimpleNamespace(free=10**12)
    try:
        checkpoints.save(20, noise(20, 1_000_000), {"step": 20})
        checkpoints.save(30, noise(30, 1_000_000), {"step": 30})
    except UserError as error:
        print(error)
    print(sorted(entry.name for entry in folder.iterdir()))
    wanted = {"w": jax.ShapeDtypeStruct((100,), "float32", sharding=noise(10, 100)["w"].sharding)}
    state, extra = checkpoints.restore(checkpoints.latest(), wanted)
    assert (state["w"] == noise(10, 100)["w"]).all()
    assert extra == {"step": 10}
    checkpoints.save(40, noise(40, 200), {"step": 40})
    checkpoints.close()
    print(checkpoints.steps())
"""


def check_full(done, folder, reason):
    assert done.stderr == ""
    told, *rest = done.stdout.splitlines()
    assert re.fullmatch(
        f"{re.escape(str(folder))}: cannot write the checkpoint of step 20: {reason}; "
        "the checkpoint of step 10 is still valid: make room and start the same command again",
        told,
    )
    assert rest == ["['10']", "[10, 40]"]
    assert done.returncode == 0


def test_a_limit_on_file_sizes_ends_in_one_line_and_the_earlier_checkpoint_stays(folder):
    check_full(run(FULL, folder, 1_000_000), folder, "File too large")


@pytest.mark.parametrize(
    ("claim", "figures"), [("", r" \(4,000,000 bytes needed, [0-9,]+ free\)"), ("claim-room", "")]
)
def test_a_full_disk_ends_in_one_line_and_the_earlier_checkpoint_stays(tmp_path, claim, figures):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=3m tmpfs "{disk}" && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, "sh")
    possible = (
        subprocess.run([*prefix, "true"], capture_output=True, text=True) if shutil.which("unshare") else None
    )
    if possible is None or possible.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs: {possible.stderr.strip() if possible else 'no unshare'}")
    done = run(FULL, disk / "checkpoints", 0, claim, prefix=prefix)
    check_full(done, disk / "checkpoints", f"No space left on device{figures}")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", keep=2)
    with pytest.raises(
        UserError, match=r"cannot write the checkpoint of step 1: Not a directory; there is no earlier"
    ):
        checkpoints.save(1, state_of(1), {})
    checkpoints.close()


def test_no_room_is_noticed_before_writing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    state = {"weight": jnp.ones((50, 20), jnp.float32)}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_999))
    with pytest.raises(
        UserError, match=r"step 2: No space left .* \(4,000 bytes needed, 3,999 free\); the .* 1 is"
    ):
        checkpoints.save(2, state, {})
    assert checkpoints.steps() == [1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4_000))
    checkpoints.save(3, state, {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


def test_a_save_that_hangs_is_given_up(folder, monkeypatch, caplog):
    checkpoints = Checkpoints(folder, keep=1)
    release = threading.Event()
    monkeypatch.setattr(checkpoints, "close", lambda: release.wait(60))
    begun = time.monotonic()
    checkpoints.close_within(0.2)
    assert 0.2 <= time.monotonic() - begun < 30
    assert caplog.messages == [f"{folder}: gave up the checkpoint under way after 0 s"]
    release.set()
    monkeypatch.setattr(checkpoints, "close", lambda: 1 / 0)
    checkpoints.close_within(60)  # pytest makes an error of what a thread raises
    monkeypatch.undo()
    caplog.clear()
    checkpoints.save(1, state_of(1), {})
    checkpoints.close_within(60)
    assert checkpoints.steps() == [1]
    assert not caplog.messages
