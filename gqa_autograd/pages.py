"""Which pages of a pool are in use, by how many sequences, and what stands in them: the host's side of a paged cache, without tensors.

A full page is known by its content: the tokens in it and the page before it. Whoever begins with the same tokens takes the page itself.
A page that nobody uses but that is known stays so until its place is needed; the one unused longest goes first."""

from collections import OrderedDict
from collections.abc import Sequence

# The serial number of the page before, 0 for none, and the tokens: compared whole, so no two contents are ever taken for one
_Key = tuple[int, tuple[int, ...]]


class PagePool:
    """Pages 0 … num_pages - 1 of page_size tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self._free = list(reversed(range(num_pages)))
        self._users = [0] * num_pages
        self._serial = [0] * num_pages
        self._keys: list[_Key | None] = [None] * num_pages
        self._known: dict[_Key, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._serials = 0

    @property
    def available(self) -> int:
        """Pages that `take` could give: free ones, and known ones that nobody uses."""
        return len(self._free) + len(self._unused)

    def users(self, page: int) -> int:
        return self._users[page]

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The known pages that hold the beginning of tokens. One token at least is left over: it must be computed, for what comes next."""
        pages: list[int] = []
        serial = 0
        for n in range((len(tokens) - 1) // self.page_size):
            page = self._known.get((serial, self._content(tokens, n)))
            if page is None:
                break
            serial = self._serial[page]
            pages.append(page)
        return pages

    def take(self, known: Sequence[int], count: int) -> list[int] | None:
        """The pages of `match`, and `count` others, for one more user; None, and nothing taken, if there are too few."""
        if count > self.available - sum(page in self._unused for page in known):
            return None
        for page in known:
            self._unused.pop(page, None)
        pages = [*known, *(self._free.pop() if self._free else self._forget() for _ in range(count))]
        for page in pages:
            self._users[page] += 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One user less. The last page first: of a sequence, the beginning is worth most."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._unused[page] = None

    def share(self, pages: Sequence[int], tokens: Sequence[int]) -> None:
        """From now on the full ones of these pages, which hold tokens, are known, unless another is known to hold the same."""
        serial = 0
        for n, page in enumerate(pages[: len(tokens) // self.page_size]):
            key = serial, self._content(tokens, n)
            known = self._known.get(key)
            if known is None:
                known = page
                self._serials += 1
                self._known[key], self._keys[page], self._serial[page] = page, key, self._serials
            serial = self._serial[known]

    def _content(self, tokens: Sequence[int], n: int) -> tuple[int, ...]:
        return tuple(tokens[n * self.page_size : (n + 1) * self.page_size])

    def _forget(self) -> int:
        page, _ = self._unused.popitem(last=False)
        key = self._keys[page]
        assert key is not None
        del self._known[key]
        self._keys[page] = None
        return page
