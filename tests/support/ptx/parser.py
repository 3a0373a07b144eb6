"""PTX text as data: kernels with decoded instructions, and the variables of the module."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    bits: int  # the low 64 bits of an integer, or the bits of a float


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Pack:
    """`{a, b, ...}`, a vector of registers, or `a|b`, a result and its predicate."""

    elements: tuple


Operand = Register | Immediate | Symbol | Address | Pack


@dataclass(frozen=True)
class Instruction:
    text: str
    guard: Register | None  # executed by the threads where it holds
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def type(self) -> str:
        """The last modifier: what the instruction computes in."""
        return self.modifiers[-1]


@dataclass
class Variable:
    space: str  # "global", "const" or "shared"
    alignment: int
    size: int
    content: bytes | None = None


@dataclass
class Kernel:
    name: str
    parameters: dict[str, Variable] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name -> declared type, "b32" or "pred"
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    max_threads: int = 1024


@dataclass
class Module:
    kernels: dict[str, Kernel]
    variables: dict[str, Variable]  # dynamic shared memory has size 0


BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
VARIABLE = re.compile(
    r"\.(?P<space>global|const|shared)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[bfsu]\d+)\s+"
    r"(?P<name>[\w$]+)(?P<array>\[\d*\])?(?:\s*=\s*(?P<content>\{[^}]*\}|[^;]+))?;"
)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.S)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[^%]*?\.align\s+\d+)?\s+([\w$]+)(?:\[(\d+)\])?"
)


def parse(text: str) -> Module:
    """Reads a whole PTX file; what it does not know stays for the interpreter to refuse."""
    text = re.sub(r"//[^\n]*", "", text)
    kernels, outside, position = {}, [], 0
    for match in ENTRY.finditer(text):
        if match.start() < position:
            continue
        end = _closing_brace(text, match.end())
        kernel = _kernel(match[1], match[2], match[3], text[match.end() : end])
        kernels[kernel.name] = kernel
        outside.append(text[position : match.start()])
        position = end
    outside.append(text[position:])
    return Module(kernels, dict(_variables("".join(outside))))


def _closing_brace(text: str, position: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("unbalanced braces in PTX")


def _variables(text: str):
    for match in VARIABLE.finditer(text):
        element = BYTES[match["type"][1:]]
        count = 1 if match["array"] is None else int(match["array"][1:-1] or 0)
        content = None
        if match["content"]:
            values = [int(v, 0) for v in match["content"].strip("{}").split(",")]
            content = b"".join((v & (1 << 8 * element) - 1).to_bytes(element, "little") for v in values)
            content = content.ljust(element * count, b"\0")
        yield match["name"], Variable(match["space"], int(match["align"] or element), element * count, content)


def _kernel(name: str, parameters: str, directives: str, body: str) -> Kernel:
    kernel = Kernel(name)
    for align, kind, parameter, count in PARAMETER.findall(parameters):
        size = BYTES[kind[1:]]
        kernel.parameters[parameter] = Variable("param", int(align or size), size * int(count or 1))
    if limit := re.search(r"\.maxntid\s+(\d+)", directives):
        kernel.max_threads = int(limit[1])
    kernel.shared = {n: v for n, v in _variables(body) if v.space == "shared"}
    _body(kernel, VARIABLE.sub("", body))
    return kernel


def _body(kernel: Kernel, body: str) -> None:
    """Statements end in `;`. A brace at the start of one opens or closes a scope of registers (inline assembly)."""
    scopes: list[dict[str, str]] = [{}]
    for statement in body.split(";"):
        statement = statement.strip()
        while statement:
            if statement[0] == "{":
                scopes.append({})
                statement = statement[1:].strip()
            elif statement[0] == "}":
                scopes.pop()
                statement = statement[1:].strip()
            elif label := re.match(r"([\w$]+):(?!:)\s*", statement):
                kernel.labels[label[1]] = len(kernel.code)
                statement = statement[label.end() :]
            elif statement.startswith(".reg"):
                _declare(kernel, scopes, statement)
                break
            elif statement[0] == ".":  # .pragma, .loc: nothing to execute
                break
            else:
                kernel.code.append(_instruction(" ".join(statement.split()), scopes))
                break


def _declare(kernel: Kernel, scopes: list[dict[str, str]], statement: str) -> None:
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
    for name in (n.strip() for n in names.split(",")):
        if family := re.match(r"(%?[\w$]+)<(\d+)>", name):
            kernel.registers.update({f"{family[1]}{i}": kind for i in range(int(family[2]))})
        else:
            unique = f"{name}#{len(kernel.registers)}"  # two scopes may use one name
            scopes[-1][name] = unique
            kernel.registers[unique] = kind


def _instruction(text: str, scopes: list[dict[str, str]]) -> Instruction:
    guard, rest = None, text
    if match := re.match(r"@(!?)(%?[\w$]+)\s+", rest):
        guard = Register(_resolve(match[2], scopes), match[1] == "!")
        rest = rest[match.end() :]
    name, _, arguments = rest.partition(" ")
    opcode, *modifiers = name.split(".")
    pieces = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", arguments)
    return Instruction(text, guard, opcode, tuple(modifiers), tuple(_operand(p, scopes) for p in pieces))


def _resolve(name: str, scopes: list[dict[str, str]]) -> str:
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)


def _operand(text: str, scopes: list[dict[str, str]]) -> Operand:
    if text[0] == "{":
        return Pack(tuple(_operand(t.strip(), scopes) for t in text[1:-1].split(",")))
    if "|" in text:
        return Pack(tuple(_operand(t, scopes) for t in text.split("|")))
    if text[0] == "[":
        base, offset = re.fullmatch(r"\[\s*([^+\s]+?)\s*(?:\+\s*(-?\d+))?\s*\]", text).groups()
        return Address(_operand(base, scopes), int(offset or 0))
    if text[0] == "!":
        return Register(_resolve(text[1:], scopes), negated=True)
    if re.fullmatch(r"0[fdFD][0-9a-fA-F]+", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?\d+U?|-?0[xX][0-9a-fA-F]+U?", text):
        return Immediate(int(text.rstrip("U"), 0) & (1 << 64) - 1)
    name = _resolve(text, scopes)
    return Register(name) if text[0] == "%" or text == "_" or name != text else Symbol(text)
