"""Writes a small parallel corpus in two real languages, without any download.

A sentence joins a few facts: dates, times, durations, amounts of money, measurements, names of
countries and languages, number words, ordinals, and lists of these. Both sides are phrased by the
locale data that ship with Babel (Unicode CLDR) and by num2words, so any two languages that both
know will do:

    python recipes/corpus.py OUT --src de --tgt en --size 20000 --seed 1

or, for summaries, documents of several sentences, of which the target tells the first:

    python recipes/corpus.py OUT --src en --tgt en --names document summary --sentences 4

What makes it a testbed rather than a table to memorise:

- Every day of the year, clock time and number above 100 belongs to exactly one of train, valid and
  test, decided by a hash of its value. What is tested was never seen in training; only its parts
  (days, months, digits) were.
- Source and target pick their phrasing apart: they agree most of the time, not always, so that
  even a perfect model is uncertain of the wording (14:30 or 2:30 PM, 45 or forty-five).
- Names are drawn by a long-tailed distribution; many occur a handful of times.

Adapt it: write another function like those under "facts", and add it to FACTS.
"""

import argparse
import datetime
import hashlib
import os
import random
import re
import sys

from babel import Locale, UnknownLocaleError
from babel.dates import (
    format_date,
    format_interval,
    format_skeleton,
    format_time,
    format_timedelta,
)
from babel.lists import format_list
from babel.numbers import (
    format_compact_decimal,
    format_currency,
    format_decimal,
    format_percent,
)
from babel.units import format_compound_unit, format_unit
from num2words import num2words

SPLITS = ("train", "valid", "test")
AGREE = 0.8  # how often the target takes the phrasing that the source has

UNITS = (
    "length-kilometer length-meter length-centimeter length-mile mass-kilogram mass-gram mass-ton "
    "volume-liter volume-milliliter area-hectare area-square-meter temperature-celsius "
    "duration-second duration-minute duration-hour duration-day duration-week duration-month "
    "duration-year power-kilowatt power-watt energy-kilojoule digital-gigabyte digital-megabyte "
    "electric-volt"
).split()
CURRENCIES = (
    "EUR USD GBP CHF JPY CNY PLN SEK NOK DKK CZK HUF "
    "RUB TRY INR BRL CAD AUD MXN ZAR KRW THB EGP ILS"
).split()


class Draw:
    """Draws the values that belong to one split."""

    def __init__(self, rng, split, names):
        self.rng, self.split, self.names = rng, split, names

    def own(self, kind, sample, key=str):
        """A value of `sample()` that belongs to this split: 80% do to train, 10% to each other.

        `key` is what of the value decides.
        """
        while True:
            value = sample()
            digest = hashlib.md5("{}:{}".format(kind, key(value)).encode()).digest()
            if self.split == SPLITS[max(0, digest[0] % 10 - 7)]:
                return value

    def number(self, top, low=2):
        """A whole number below `top`, each magnitude equally likely."""

        def key(n):  # numbers to 100 are vocabulary, not combinations: they are in every split
            return n if n > 100 else self.rng.random()

        return self.own("number", lambda: int(low * (top / low) ** self.rng.random()), key)

    def date(self, first=datetime.date(1950, 1, 1), days=36500):
        """A date of the `days` from `first` on."""
        return self.own(
            "date",
            lambda: first + datetime.timedelta(self.rng.randrange(days)),
            key=lambda date: (date.month, date.day),
        )

    def time(self):
        return datetime.time(
            *self.own("time", lambda: (self.rng.randrange(24), self.rng.randrange(60)))
        )

    def name(self, kind):
        """The rank is log-uniform: the first names are frequent, the last ones rare."""
        names = self.names[kind]
        return names[int(len(names) ** self.rng.random()) - 1]

    def some(self, draw, low=2, high=3):
        """Two or three different values."""
        count, values = self.rng.randint(low, high), []
        while len(values) < count:
            value = draw()
            if value not in values:
                values.append(value)
        return values


# ---- facts: each draws its meaning, and returns its phrasings as functions of a locale


def weekday_date(draw):
    date = draw.date()
    return [
        lambda loc: format_date(date, "full", locale=loc),
        lambda loc: format_skeleton("yMMMEd", date, locale=loc),
    ]


def date(draw):
    date = draw.date()
    return [
        lambda loc: format_date(date, "long", locale=loc),
        lambda loc: format_date(date, "medium", locale=loc),
    ]


def day_and_time(draw):
    date, time = draw.date(), draw.time()
    return [
        lambda loc: "{}, {}".format(
            format_skeleton("MMMMEEEEd", date, locale=loc), format_time(time, "short", locale=loc)
        ),
        lambda loc: "{}, {}".format(
            format_skeleton("Hm", time, locale=loc), format_skeleton("MMMMEEEEd", date, locale=loc)
        ),
    ]


def date_interval(draw):
    start = draw.date()
    end = draw.date(start + datetime.timedelta(2), days=90)
    return [lambda loc: format_interval(start, end, "yMMMd", locale=loc)]


def relative(draw):
    unit = draw.rng.choice(["second", "minute", "hour", "day", "week", "month", "year"])
    seconds = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
    seconds.update(month=2592000, year=31536000)
    delta = datetime.timedelta(seconds=draw.number(1000) * seconds[unit] * draw.rng.choice([1, -1]))
    return [
        lambda loc: format_timedelta(
            delta, granularity=unit, threshold=10**9, add_direction=True, locale=loc
        )
    ]


def measure(draw):
    unit, value = draw.rng.choice(UNITS), draw.number(100000)

    def digits(loc):
        return format_unit(value, unit, locale=loc)

    def words(loc):
        number = format_decimal(value, locale=loc)
        return digits(loc).replace(number, in_words(value, loc))

    return [digits, words]


def measures(draw):
    return listed(draw, draw.some(lambda: tuple(measure(draw))))


def money(draw):
    amount, currency = draw.number(1000000, low=10), draw.rng.choice(CURRENCIES)
    if draw.rng.random() < 0.4:
        amount += draw.rng.randrange(1, 100) / 100
    return [
        lambda loc: format_currency(amount, currency, locale=loc, format_type="name"),
        lambda loc: format_currency(amount, currency, locale=loc),
    ]


def large(draw):
    amount = draw.number(10000, low=11) * 10 ** draw.rng.choice([5, 8])
    return [
        lambda loc: format_compact_decimal(
            amount, format_type="long", fraction_digits=1, locale=loc
        ),
        lambda loc: format_decimal(amount, locale=loc),
    ]


def percent(draw):
    value = draw.number(10000, low=10) / 10000
    return [lambda loc: format_percent(value, locale=loc, decimal_quantization=False)]


def speed(draw):
    value = draw.number(1000)
    return [
        lambda loc: format_compound_unit(
            value, "length-kilometer", denominator_unit="duration-hour", locale=loc
        )
    ]


def cardinals(draw):
    values = draw.some(lambda: draw.number(100000))
    return listed(draw, [(lambda loc, v=v: in_words(v, loc),) for v in values])


def ordinals(draw):
    values = draw.some(lambda: draw.number(1000))
    return listed(
        draw, [(lambda loc, v=v: num2words(v, lang=loc.language, to="ordinal"),) for v in values]
    )


def countries(draw):
    codes = draw.some(lambda: draw.name("territories"), 1, 4)
    return listed(draw, [(lambda loc, c=c: loc.territories[c],) for c in codes])


def languages(draw):
    codes = draw.some(lambda: draw.name("languages"), 1, 4)
    return listed(draw, [(lambda loc, c=c: loc.languages[c],) for c in codes])


FACTS = (
    weekday_date,
    date,
    day_and_time,
    date_interval,
    relative,
    measure,
    measures,
    money,
    large,
    percent,
    speed,
    cardinals,
    ordinals,
    countries,
    languages,
)


def in_words(value, loc):
    return num2words(value, lang=loc.language)


def listed(draw, items):
    style = draw.rng.choice(["standard", "or"])
    return [
        lambda loc, i=i: format_list(
            [item[min(i, len(item) - 1)](loc) for item in items], style, loc
        )
        for i in range(max(map(len, items)))
    ]


# ---- sentences

FRAMES = ("{0}: {1}; {2}.", "{1}; {2} ({0}).", "{0} – {2}, {1}.", "{0}: {1}.", "{1} ({0}).")


def sentence(draw, source, target, facts):
    """One pair of sentences about the same two or three facts."""
    rng = draw.rng
    size = rng.choice([2, 3, 3])
    phrasings = [fact(draw) for fact in rng.sample(facts, size)]
    frames = FRAMES[:3] if size == 3 else FRAMES[3:]
    frame = rng.randrange(len(frames))
    style = [rng.randrange(len(p)) for p in phrasings]
    pair = []
    for locale in (source, target):
        if locale is target:
            frame = other(rng, frame, len(frames))
            style = [other(rng, s, len(p)) for s, p in zip(style, phrasings)]
        words = [p[s](locale) for s, p in zip(style, phrasings)]
        # CLDR is rich in narrow and unbreakable spaces; scores should not depend on them.
        pair.append(re.sub(r"\s+", " ", frames[frame].format(*words)).strip())
    return pair


def document(draw, source, target, facts, size):
    """So many sentences, and their first one in other words: as in the news, it matters most."""
    pairs = [sentence(draw, source, target, facts) for _ in range(size)]
    return [" ".join(pair[0] for pair in pairs), pairs[0][1]]


def other(rng, choice, count):
    return choice if rng.random() < AGREE else rng.randrange(count)


def usable(facts, source, target, names):
    """The facts that both languages can phrase; says which are left out."""
    left = []
    for fact in facts:
        try:
            for seed in range(20):
                for phrase in fact(Draw(random.Random(seed), "train", names)):
                    phrase(source), phrase(target)
            left.append(fact)
        except Exception as error:  # each library has its own way of not knowing something
            print("corpus.py: without {}: {!r}".format(fact.__name__, error), file=sys.stderr)
    return left


def locale_of(language):
    try:
        locale = Locale.parse(language)
        num2words(21, lang=locale.language)
        return locale
    except (UnknownLocaleError, ValueError, NotImplementedError):
        raise SystemExit(
            "corpus.py: expected a language that both Babel and num2words know, got {!r}; "
            "try de, en, fr, es, it, pl, nl, or pass your own text with DATA=dir".format(language)
        ) from None


def write(folder, source, target, sizes, seed, sentences=1, names=None):
    codes = {
        kind: sorted(
            code
            for code in getattr(source, kind)
            if re.fullmatch("[A-Za-z]{2}", code) and code in getattr(target, kind)
        )
        for kind in ("territories", "languages")
    }
    for kind in codes:
        random.Random(seed).shuffle(codes[kind])
    facts = usable(FACTS, source, target, codes)
    if len(facts) < 3:
        raise SystemExit("corpus.py: these two languages share too few phrasings; take others")
    os.makedirs(folder, exist_ok=True)
    seen = set()
    for split, size in zip(SPLITS, sizes):
        draw = Draw(random.Random("{}-{}".format(seed, split)), split, codes)
        pairs = []
        while len(pairs) < size:
            pair = document(draw, source, target, facts, sentences)
            if pair[0] not in seen:
                seen.add(pair[0])
                pairs.append(pair)
        for side, name in enumerate(names or (source, target)):
            path = os.path.join(folder, "{}.{}".format(split, name))
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(pair[side] + "\n" for pair in pairs)


def main():
    parser = argparse.ArgumentParser(description="Write a parallel corpus without any download.")
    parser.add_argument("folder", help="where train, valid and test go, one file per language")
    parser.add_argument("--src", default="de", help="source language")
    parser.add_argument("--tgt", default="en", help="target language")
    parser.add_argument("--size", type=int, default=20000, help="training pairs")
    parser.add_argument(
        "--held-out", type=int, default=1000, help="pairs in each of valid and test"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--sentences", type=int, default=1, help="of a source, whose first one is the target"
    )
    parser.add_argument("--names", nargs=2, help="how files' names end (default: the languages)")
    args = parser.parse_args()
    sizes = (args.size, args.held_out, args.held_out)
    if args.src == args.tgt and args.names is None:
        parser.error("one language on both sides: give --names for their files")
    languages = locale_of(args.src), locale_of(args.tgt)
    write(args.folder, *languages, sizes, args.seed, args.sentences, args.names)


if __name__ == "__main__":
    main()
