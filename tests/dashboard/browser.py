"""What the browser tests share: wait for a chart, read its layout, drag over it."""

import re
import time


def chart(page, name: str):
    """The chart `name`, once it is drawn."""
    plot = page.locator(f"#{name} .js-plotly-plot")
    plot.locator(".main-svg").first.wait_for()
    until(
        page, f"document.querySelector('#{name} .js-plotly-plot')?.layout?.xaxis?.visible !== false"
    )
    return plot


def until(page, expression: str, again=None, seconds: float = 20) -> None:
    """Waits for something to hold; the page's own policy forbids the `eval` of wait_for_function.

    `again` is a gesture, made anew every two seconds: a chart that is just being laid out may miss
    one, as it would miss a reader's.
    """
    end, next_time = time.monotonic() + seconds, 0.0
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never came true: {expression}"
        if again and time.monotonic() > next_time:
            again()
            next_time = time.monotonic() + 2
        page.wait_for_timeout(50)


def layout(page, name: str, path: str):
    return page.evaluate(f"document.querySelector('#{name} .js-plotly-plot')._fullLayout.{path}")


def plot_area(page, name: str) -> dict:
    return chart(page, name).locator(".nsewdrag").first.bounding_box()


def drag(page, name: str, start: float, end: float) -> None:
    """Drags over the plot area of a chart, from one share of its width to another."""
    box = plot_area(page, name)
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], y, steps=6)
    page.mouse.up()


def zoom(page, name: str, start: float, end: float) -> tuple[int, int]:
    """The range of steps in the address after a drag."""
    until(page, "location.search.includes('steps=')", lambda: drag(page, name, start, end))
    low, high = re.search(r"steps=(\d+)-(\d+)", page.url).groups()
    return int(low), int(high)
