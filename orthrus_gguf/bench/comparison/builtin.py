"""The built-in prompts, short enough for small contexts: what a text is like decides what drafts
are worth, so the domains range from text that nearly writes itself to text that nobody foresees.

All but those of `chat` are beginnings to be continued, so that models of any kind can take them.
"""

from __future__ import annotations

_DURATION = '''\
import re


def parse_duration(text: str) -> int:
    """Return the number of seconds in a text like "1h 30m" or "45s".

    Raises ValueError if the text is not a duration.
    """
'''

_RING_BUFFER = '''\
class RingBuffer:
    """A queue of fixed capacity that forgets its oldest items."""

    def __init__(self, capacity):
        if capacity < 1:
            raise ValueError("capacity must be at least 1")
        self._items = [None] * capacity
        self._start = 0
        self._length = 0

    def __len__(self):
        return self._length

    def append(self, item):
'''

_UNIT_TEST = """\
import unittest
from inventory import Inventory


class TestInventory(unittest.TestCase):

    def setUp(self):
        self.inventory = Inventory()

    def test_new_inventory_is_empty(self):
        self.assertEqual(len(self.inventory), 0)

    def test_add_increases_quantity(self):
"""

_BINARY_SEARCH = """\
#include <stddef.h>

/* Returns the index of the first element that is not less than key, or n if there is none. */
size_t lower_bound(const int *values, size_t n, int key)
{
"""

_LIGHTHOUSE = """\
The lighthouse had been dark for eleven years when Marta found the key. It lay in the drawer of her\
 grandfather's desk, wrapped in a page of newspaper, and"""

_TIDES = """\
Tides are the regular rise and fall of the sea. They are caused by the gravity of the Moon and,\
 to a lesser degree, of the Sun. Most coasts see two high tides a day, because"""

_LETTER = """\
Dear Anna,

Thank you for your long letter. I read it on the train home, twice, and I have thought about little\
 else since. You ask whether I would make the same decision again. The honest answer is"""

_CITIES = """\
There is an old argument about whether great cities are planned or grown. Those who say that they\
 are planned point to the wide avenues; those who say that they grew"""

_RIVERS = """\
Ten long rivers of the world and the seas they flow into:

1. Nile: Mediterranean Sea
2. Amazon: Atlantic Ocean
3. Yangtze:"""

_PACKING = """\
# Packing list for a week in the mountains

## Clothes
- two pairs of hiking trousers
- five pairs of socks
- a rain jacket

## Equipment
-"""

_PLANETS = """\
| planet | moons | day in hours | rings |
|---|--:|--:|---|
| Mercury | 0 | 4222.6 | no |
| Venus | 0 | 2802.0 | no |
| Earth |"""

_RECIPE = """\
Vegetable soup for four people

Ingredients:
- 2 onions
- 3 carrots
- 4 potatoes
- 1 leek

Steps:
1. Peel the onions and chop them.
2."""

_PAINT = """\
A room is 5 m long, 4 m wide and 2.5 m high. It has one door of 2 m² and two windows of 1.5 m²\
 each. One litre of paint covers 8 m². How many litres do I need for two coats on the walls? Show\
 the steps."""

_SLEEP = "Why do we sleep? Explain it in a short paragraph, in words that a child understands."

_TRANSLATE = """\
Translate into French and German: "The shop at the corner is closed on Mondays, but you can buy\
 bread at the station.\""""

_CSV = """\
How do I read a CSV file in Python and sum one column by the value of another? Please give a short\
 example without third-party packages."""

_LOG = """\
2024-05-01 08:00:00 INFO  worker-1 started job 1001
2024-05-01 08:00:02 INFO  worker-1 finished job 1001 in 2.0 s
2024-05-01 08:00:02 INFO  worker-1 started job 1002
2024-05-01 08:00:04 INFO  worker-1 finished job 1002 in 2.0 s
2024-05-01 08:00:04 INFO  worker-1 started job 1003
"""

_PROPERTIES = '''\
class Settings:
    @property
    def host(self):
        """Return the value of host."""
        return self._values["host"]

    @host.setter
    def host(self, value):
        self._values["host"] = value

    @property
    def port(self):
        """Return the value of port."""
        return self._values["port"]

    @port.setter
    def port(self, value):
        self._values["port"] = value

    @property
    def timeout(self):
'''

_RECORDS = """\
[
  {"id": 1, "name": "Ada", "role": "admin", "active": true},
  {"id": 2, "name": "Ben", "role": "user", "active": true},
  {"id": 3, "name": "Cleo", "role": "user", "active": false},
  {"id": 4,"""

_COPY = """\
Original:
The ferry leaves at seven in the morning and returns at six in the evening. Tickets are sold at the\
 harbour office, which opens half an hour before departure. Dogs travel free of charge.

Copy:
The ferry leaves at seven"""

PROMPTS: dict[str, tuple[str, ...]] = {
    "code": (_DURATION, _RING_BUFFER, _UNIT_TEST, _BINARY_SEARCH),
    "prose": (_LIGHTHOUSE, _TIDES, _LETTER, _CITIES),
    "list": (_RIVERS, _PACKING, _PLANETS, _RECIPE),
    "chat": (_PAINT, _SLEEP, _TRANSLATE, _CSV),
    "repetition": (_LOG, _PROPERTIES, _RECORDS, _COPY),
}
