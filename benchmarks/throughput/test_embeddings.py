from benchmarks.suites import embeddings

SUITE = embeddings


def test_embeddings(benchmark, contestant):
    contestant.time(benchmark)
