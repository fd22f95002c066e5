"""What the scripted server says, by the first word of the last message."""

SHOW = """A number is **prime** when it is greater than 1 and divisible by nothing but 1 and itself. It is enough \
to try divisors up to $\\sqrt{n}$:

```python
def is_prime(n: int) -> bool:
    # Divisors come in pairs: one of each pair is at most the root.
    if n < 2:
        return False
    return all(n % d for d in range(2, int(n ** 0.5) + 1))

print([n for n in range(30) if is_prime(n)], "primes")
```

### How fast it is
1. The loop runs at most $\\lfloor\\sqrt{n}\\rfloor$ times.
2. Each step is *one* division:
   - for small `n` that is nothing;
   - for large `n` use a probabilistic test.
3. ~~Caching~~ is not needed.

| Method | Time | Exact |
|:--|--:|:-:|
| trial division | $O(\\sqrt{n})$ | yes |
| Miller–Rabin | $O(k \\log^3 n)$ | no |
| sieve, up to $n$ | $O(n \\log\\log n)$ | yes |

> The prime number theorem says how many there are:

\\[ \\pi(x) \\sim \\frac{x}{\\ln x}, \\qquad \\sum_{p \\le x} \\frac{1}{p} = \\ln\\ln x + M \
+ O\\left(\\frac{1}{\\ln x}\\right) \\]

- [x] read the question
- [ ] prove it

More at [Wikipedia](https://en.wikipedia.org/wiki/Prime_number).
"""

HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

# <b onmouseover=window.hacked=3>heading</b>

[a link](javascript:window.hacked=4) [data](data:text/html,<script>window.hacked=5</script>)
![picture](http://127.0.0.1:9/spy.png?q=secret) <javascript:window.hacked=6> <svg/onload=window.hacked=7>

```"><script>window.hacked = 8</script>
</code></pre><script>window.hacked = 9</script>
```

| <iframe src="javascript:window.hacked=10"> | b |
|---|---|
| <style>body{display:none}</style> | `</td><script>window.hacked=11</script>` |

$\\text{<script>window.hacked=12</script>}$ \\(\\href{javascript:window.hacked=13}{x}\\)

[x](https://example.org/"onmouseover="window.hacked=14) <https://example.org/"><img/src/onerror=window.hacked=15>

> - <details open ontoggle=window.hacked=16>

The end of hostility.
"""

ANSWERS = {
    "show": SHOW,
    "write": SHOW,
    "hostile": HOSTILE,
    "think": "There are **46** of them: $33 + 19 - 6 = 46$.",
    "how": "**46.** By inclusion and exclusion:\n\n\\[ \\left\\lfloor\\frac{99}{3}\\right\\rfloor "
           "+ \\left\\lfloor\\frac{99}{5}\\right\\rfloor - \\left\\lfloor\\frac{99}{15}\\right\\rfloor = 33 "
           "+ 19 - 6 = 46 \\]\n\nMultiples of 15 were counted twice, so they are taken away once.",
    "slow": " ".join(f"word{number}" for number in range(400)),
    "broken": "This answer will fail in the mid",
    "cut": "This answer will be cut o",
    "length": "This answer is as long as it may be and",
    "two": "First paragraph, which stays.\n\nSecond paragraph.\n\nThird one that grows for a while and a while longer.",
}

THOUGHTS = {
    "think": "The user wants a count. Multiples of 3: 33. Multiples of 5: 19.\n\nBoth: 6. So 33 + 19 - 6 = 46.\n\n"
             "Wait, is 0 counted? No.",
    "how": "Count multiples of 3 below 100: the largest is 99, so there are 33.\n\nMultiples of 5: 95 is the largest, "
           "so 19.\n\nMultiples of 15 are in both: 90 is the largest, so 6.\n\n33 + 19 - 6 = 46.",
}
