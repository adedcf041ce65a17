"""All orders in which the parts of a program can go on, from what was recorded of each."""

from __future__ import annotations

from typing import Any, NamedTuple

from gluon_emulation import Barrier, Operation, Program

# A copy that has begun: its barrier, its bytes, its buffer and what comes into that.
Copy = tuple[str, int, str, Any]


class State(NamedTuple):
    """How far each part is, the barriers, what buffers hold (None: a copy has begun), the copies on
    their way, and for each part the buffers that its products may still read."""

    at: tuple[int, ...]
    barriers: tuple[Barrier, ...]
    contents: tuple[Any, ...]
    copies: frozenset[Copy]
    reading: tuple[frozenset[str], ...]


class Wrong(AssertionError):
    pass


class Schedule:
    """The parts' operations after the barriers were made."""

    def __init__(self, program: Program):
        self.traces = program.traces
        self.barriers = list(program.barriers)
        counts = [program.barriers[name].count for name in self.barriers]
        operations = [one for trace in self.traces for one in trace]
        self.buffers = sorted({name for one in operations for name, _ in one.contents})
        nothing = frozenset[str]()
        self.first = State(
            tuple(0 for _ in self.traces), tuple(Barrier(count, count) for count in counts),
            tuple(None for _ in self.buffers), frozenset(), tuple(nothing for _ in self.traces),
        )  # fmt: skip

    def explore(self) -> int:
        """The number of states that can be reached.

        Raises:
            Wrong: nobody can go on, or a buffer is overwritten or read at the wrong time.
        """
        seen, todo = {self.first}, [self.first]
        while todo:
            state = todo.pop()
            following = [self.ended(state, copy) for copy in state.copies]
            for part, trace in enumerate(self.traces):
                if state.at[part] < len(trace):
                    after = self.after(state, part, trace[state.at[part]])
                    following += [] if after is None else [after]
            if not following and any(map(self.left, range(len(self.traces)), state.at)):
                raise Wrong(f"nobody can go on: {state.at}")
            for one in following:
                if one not in seen:
                    seen.add(one)
                    todo.append(one)
        return len(seen)

    def left(self, part: int, at: int) -> bool:
        return at < len(self.traces[part])

    def ended(self, state: State, copy: Copy) -> State:
        barrier, size, buffer, content = copy
        return state._replace(
            barriers=self.moved(state.barriers, barrier, 0, -size),
            contents=self.held(state.contents, buffer, content),
            copies=state.copies - {copy},
        )

    def after(self, state: State, part: int, operation: Operation) -> State | None:
        """None where the part has to wait."""
        kind, name, number, contents = operation
        at = tuple(one + (index == part) for index, one in enumerate(state.at))
        if kind == "wait":
            passed = state.barriers[self.barriers.index(name)].passed(number)
            return state._replace(at=at) if passed else None
        if kind in ("arrive", "expect"):
            change = (number, 0) if kind == "arrive" else (1, number)
            return state._replace(at=at, barriers=self.moved(state.barriers, name, *change))
        if kind == "copy":
            ((buffer, content),) = contents
            if any(buffer in reading for reading in state.reading):
                raise Wrong(f"{buffer} is overwritten while it is read")
            if any(buffer == copy[2] for copy in state.copies):
                raise Wrong(f"two copies into {buffer}")
            return state._replace(
                at=at,
                contents=self.held(state.contents, buffer, None),
                copies=state.copies | {(name, number, buffer, content)},
            )
        reading = list(state.reading)
        for buffer, content in contents:
            found = state.contents[self.buffers.index(buffer)]
            if found != content:
                raise Wrong(f"{buffer} holds {found}, not {content}")
        if kind == "multiply":
            reading[part] |= {buffer for buffer, _ in contents}
        if kind == "finish":
            reading[part] = frozenset()
        return state._replace(at=at, reading=tuple(reading))

    def moved(
        self, barriers: tuple[Barrier, ...], name: str, arrivals: int, size: int
    ) -> tuple[Barrier, ...]:
        index = self.barriers.index(name)
        return (*barriers[:index], barriers[index].after(arrivals, size), *barriers[index + 1 :])

    def held(self, contents: tuple[Any, ...], buffer: str, content: Any) -> tuple[Any, ...]:
        index = self.buffers.index(buffer)
        return (*contents[:index], content, *contents[index + 1 :])
