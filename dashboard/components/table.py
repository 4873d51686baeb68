"""Tables: AG Grid with a theme that uses the CSS variables of assets/style.css."""

from typing import Any

import dash_ag_grid as dag

_THEME = (
    "themeQuartz.withParams({"
    "backgroundColor: 'var(--g-paper)', foregroundColor: 'var(--g-ink)', "
    "headerBackgroundColor: 'var(--g-paper)', headerTextColor: 'var(--g-soft)', "
    "borderColor: 'var(--g-line)', accentColor: 'var(--g-accent)', "
    "rowHoverColor: 'var(--g-hover)', wrapperBorder: false, columnBorder: false, "
    "fontFamily: 'inherit', fontSize: 13, headerFontSize: 12, headerFontWeight: 500, spacing: 6})"
)


def table(
    name: str, columns: list[dict[str, Any]], rows: list[dict], height: str | None
) -> dag.AgGrid:
    """Return a table that can be sorted, filtered and reached by keyboard.

    Each row needs an `id`. Without a `height` the table is as tall as its rows.
    """
    return dag.AgGrid(
        id=name,
        columnDefs=columns,
        rowData=rows,
        getRowId="params.data.id",
        defaultColDef={
            "sortable": True,
            "filter": True,
            "resizable": True,
            "suppressHeaderMenuButton": False,
        },
        dashGridOptions={
            "theme": {"function": _THEME},
            "animateRows": False,
            "tooltipShowDelay": 300,
            "suppressCellFocus": False,
            "domLayout": "normal" if height else "autoHeight",
        },
        style={"height": height, "width": "100%"},
        className="grid",
    )
