"""The reranker's benchmark, small: all ways rank the same questions, and the plain loop is a way of its own."""

import bench_rerank

from mmr5_train.models.loading import TINY


def test_every_way_is_measured_on_the_same_questions(tasks, page_folder):
    ways = {"plain_loop": bench_rerank.plain_loop(str(TINY), 8)}
    for name in ("direct", "logits"):
        ways[name] = bench_rerank.mode(str(TINY), name, 40, 2)
    orders = {name: rank(tasks, page_folder) for name, rank in ways.items()}
    for name, ranked in orders.items():
        assert [sorted(order) for order in ranked] == [[0, 1, 2]] * len(tasks), name
    assert orders["plain_loop"] == [[0, 1, 2]] * len(tasks), "cut off after 8 tokens: the order of the prompt"
    rows = bench_rerank.measure(ways, tasks, page_folder, repeats=1)
    assert [row["way"] for row in rows] == list(ways)
    assert rows[0]["times_the_plain_loop"] == 1
    for row in rows:
        assert row["questions_per_s"] > 0
        assert row["recall@1"] == round(bench_rerank.recall(orders[row["way"]], tasks), 4)
