"""The reranker's benchmark at a small size: all methods rank the same questions."""

import bench_rerank

from mmr5_train.models.loading import TINY


def test_every_method_ranks_the_same_questions(tasks, page_folder):
    methods = {"plain_loop": bench_rerank.plain_loop(str(TINY), 8)}
    for name in ("direct", "logits"):
        methods[name] = bench_rerank.reranker_mode(str(TINY), name, 40, 2)
    orders = {name: rank(tasks, page_folder) for name, rank in methods.items()}
    for name, ranked in orders.items():
        assert [sorted(order) for order in ranked] == [[0, 1, 2]] * len(tasks), name
    assert orders["plain_loop"] == [[0, 1, 2]] * len(tasks), "truncated after 8 tokens, so the order of the prompt"
    rows = bench_rerank.measure(methods, tasks, page_folder, repeats=1)
    assert [row["way"] for row in rows] == list(methods)
    assert rows[0]["times_the_plain_loop"] == 1
    for row in rows:
        assert row["questions_per_s"] > 0
        assert row["recall@1"] == round(bench_rerank.mean_recall(orders[row["way"]], tasks), 4)
