"""Steps that write into memory: methods, items, functions with ``inplace`` and ``out``, by way of all views."""

from __future__ import annotations

from contextlib import suppress

from tests.fuzz.builder import Builder, Failed
from tests.fuzz.moves import moved
from tests.fuzz.vocabulary import step


def view(b: Builder, v: str) -> str:
    """An expression that looks at part of the memory of ``v``, or at all of it."""
    shape = b.shape(v)
    axis = b.number(1, len(shape) - 1)
    size, lead = shape[axis], ":, " * axis
    at = b.number(1, max(1, size - 1))
    options = [
        v, f"{v}[{lead}:{at}]", f"{v}[{lead}{at}:]", f"{v}[{lead}::2]", f"{v}[{lead}{b.number(0, size - 1)}]",
        f"{v}.chunk(2, {axis})[0]", f"{v}.split({at}, {axis})[-1]", f"{v}.narrow({axis}, 0, {at})", f"{v}.detach()",
        f"{v}.unbind({axis})[-1]", f"{v}.transpose(1, {axis})", f"{v}.view({v}.shape[0], -1)", f"{v}.flatten(1)",
        f"{v}.select({axis}, 0)", f"{v}.data", f"{v}[...]", f"{v}.unsqueeze(1)", f"{v}.movedim({axis}, 1)[:, :{at}]",
        f"{v}.data[:, :{b.number(1, shape[1])}]",
    ]  # fmt: skip
    if len(shape) > 2:
        options += [f"{v}.diagonal(0, {len(shape) - 2}, {len(shape) - 1})", f"{v}.mT", f"{v}[..., 0]"]
    return str(b.choose(*options))


METHODS = """
mul_(2) add_(0.3) clamp_(-0.5,0.7) relu_() tanh_() sigmoid_() neg_() div_(2) sub_(0.2) square_() abs_() clamp_min_(0)
zero_() fill_(0.5) pow_(2) sin_()
""".split()


def fresh(b: Builder) -> str:
    """A variable whose memory the forward may write to."""
    v = b.variable()
    return v if b.writable(v) and b.chance(0.6) else b.add(b.choose(f"{v}.clone()", f"{v} * 1", f"F.softplus({v})"))


@step(4)
def a_method(b: Builder) -> None:
    v = fresh(b)
    where = view(b, v)
    method = b.choose(*METHODS).replace(",", ", ")
    if b.chance(0.2):
        name = b.add(where)
        b.do(f"{name}.{method}")
    else:
        b.do(f"{where}.{method}")


@step(3)
def an_item(b: Builder) -> None:
    v = fresh(b)
    shape = b.shape(v)
    axis = b.number(1, len(shape) - 1)
    size, lead = shape[axis], ":, " * axis
    at = b.number(1, max(1, size - 1))
    where = b.choose(f"[{lead}:{at}]", f"[{lead}{at}:]", f"[{lead}::2]", f"[{lead}{b.number(0, size - 1)}]")
    what = b.choose(f"{v}{where} * 2", f"F.relu({v}{where})", "0", "0.5", f"{v}{where}.tanh()", f"-{v}{where}")
    with suppress(Failed):
        what = f"{b.like(v)}{where}" if b.chance(0.4) else what
    if b.chance(0.3):
        b.do(f"{v}{where} {b.choose('*=', '+=', '-=')} {b.choose('2', '0.5')}")
    else:
        b.do(f"{v}{where} = {what}")


@step(2)
def an_augmented_variable(b: Builder) -> None:
    v = fresh(b)
    other = b.choose("2", "0.5", f"{v}.mean(1, keepdim=True)")
    with suppress(Failed):
        other = b.like(v) if b.chance(0.5) else other
    b.do(f"{v} {b.choose('*=', '+=', '-=')} {other}")


@step(2)
def a_function_in_place(b: Builder) -> None:
    v = fresh(b)
    where = view(b, v)
    how = b.choose("F.relu", "F.silu", "F.leaky_relu", "F.hardtanh", "F.elu", "F.hardswish", "F.relu6")
    if b.chance(0.3):
        how = b.part(f"nn.{b.choose('ReLU', 'SiLU', 'ELU', 'Hardswish')}(inplace=True)")
        statement = f"{how}({where})"
    else:
        statement = f"{how}({where}, inplace=True)"
    if b.chance(0.4):
        b.add(statement)
    else:
        b.do(statement)


@step(1)
def an_out(b: Builder) -> None:
    v = fresh(b)
    where = view(b, v)
    b.do(b.choose(
        f"torch.mul({where}, 2, out={where})", f"torch.tanh({where}, out={where})",
        f"torch.add({where}, 0.3, out={where})", f"torch.relu_({where})", f"torch.sigmoid({where}, out={where})",
    ))  # fmt: skip


@step(2)
def a_copy(b: Builder) -> None:
    """``copy_``, ``add_``, ``mul_`` of one variable into part of another."""
    v = fresh(b)
    other = b.like(v)
    axis = b.number(1, b.values[v].dim() - 1)
    at = b.number(1, max(1, b.shape(v)[axis] - 1))
    where = f"[{':, ' * axis}:{at}]"
    b.do(f"{v}{where}.{b.choose('copy_', 'add_', 'mul_', 'sub_')}({other}{where})")


@step(3)
def filled(b: Builder) -> None:
    """Zeros or others, filled by slices."""
    v = b.variable()
    shape = b.shape(v)
    rest = ", ".join(map(str, shape[1:]))
    zeros = b.choose(
        f"torch.zeros_like({v})", f"{v}.new_zeros({v}.shape)", f"torch.empty_like({v})", f"torch.ones_like({v})",
        f"{v}.new_zeros({v}.shape[0], {rest})", f"torch.zeros({v}.shape, dtype={v}.dtype)",
    )  # fmt: skip
    out = b.add(zeros if "empty" not in zeros else f"torch.zeros_like({v})")
    at = b.number(1, max(1, shape[1] - 1))
    axis = b.number(1, len(shape) - 1)
    lead = ", :" * (axis - 1)
    first, second = f":, :{at}", f":, {at}:"
    shift = b.number(0, 2)
    if axis > 1 and shift == 0:
        b.do(f"{out}[{first}{lead[:-3]}, 1:] = {v}[{first}{lead[:-3]}, :-1]")
    elif axis > 1 and shift == 1:
        b.do(f"{out}[{first}{lead[:-3]}, :-1] = {v}[{first}{lead[:-3]}, 1:]")
    else:
        b.do(f"{out}[{first}] = {b.choose(f'{v}[{first}]', f'{v}[{first}] * 2', f'F.relu({v}[{first}])')}")
    if b.chance(0.8):
        what = b.choose(f"{v}[{second}]", f"{v}[{second}] * 3")
        b.do(b.choose(f"{out}[{second}] = {what}", f"{out}[{second}].copy_({what})", f"{out}[{second}].add_({what})"))


@step(1)
def written_twice(b: Builder) -> None:
    """A value is used, written, and used again."""
    v = fresh(b)
    kept = b.add(b.choose(f"{v}.clone()", f"{v} * 2", moved(b, v)))
    b.do(f"{view(b, v)}.{b.choose(*METHODS).replace(',', ', ')}")
    b.add(f"{kept} + {v}")
