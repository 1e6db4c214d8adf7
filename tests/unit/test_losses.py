"""The losses against the worked numbers of methods.md A.5.5 and against loops written from the papers."""

import math

import pytest
import torch

from llmr_ray.training import losses

COSINES = torch.tensor(
    [[0.80, 0.70, 0.60, 0.10, 0.20, 0.00], [0.05, 0.15, 0.10, 0.75, 0.65, 0.72]], dtype=torch.float64
)
REWARDS = torch.tensor([[3.0, 1.0, -1.0], [2.0, 2.0, 0.0]], dtype=torch.float64)


def layout(num_queries, group_size):
    """Own columns, no equal texts, and all other queries' documents as in-batch negatives."""
    own = torch.arange(num_queries * group_size).view(num_queries, group_size)
    same = torch.eye(group_size, dtype=torch.bool).expand(num_queries, -1, -1).clone()
    others = torch.ones(num_queries, num_queries * group_size, dtype=torch.bool).scatter(1, own, False)
    return own, same, others


def graded(sim, rewards, own, same, others, tie_policy="sorted", position0="gold_first", temperature=1.0):
    return losses.graded_distillation(
        sim, own, rewards, same, others, tie_policy=tie_policy, position0=position0, reward_temperature=temperature
    )


def naive_graded(sim, rewards, own, same, others, tie_policy, position0, temperature, include_self=True):
    """Equation 4 of LLM-Embedder and the released code's loop, one query and document at a time."""
    result = []
    for b in range(len(sim)):
        raw = rewards[b].tolist()
        weights = [math.exp(r / temperature) for r in raw]
        order = sorted(range(len(raw)), key=lambda i: (not (position0 == "gold_first" and i == 0), -raw[i], i))
        if position0 == "by_reward":
            order = sorted(range(len(raw)), key=lambda i: (-raw[i], i))
        loss = 0.0
        for i in range(len(raw)):
            negatives = []
            for j in range(len(raw)):
                if j == i or same[b, i, j]:
                    continue
                if tie_policy == "sorted":
                    worse = order.index(j) > order.index(i)
                elif position0 == "gold_first" and i == 0:
                    worse = raw[j] != raw[0]
                elif position0 == "gold_first" and j == 0:
                    worse = False
                else:
                    worse = raw[j] < raw[i]
                if worse:
                    negatives.append(int(own[b, j]))
            columns = negatives + torch.nonzero(others[b]).flatten().tolist() + [int(own[b, i])] * include_self
            denominator = sum(math.exp(float(sim[b, c])) for c in columns)
            loss -= weights[i] / sum(weights) * (float(sim[b, own[b, i]]) - math.log(denominator))
        result.append(loss)
    return torch.tensor(result)


@pytest.mark.parametrize(
    ("temperature", "tie_policy", "expected"),
    [(0.1, "sorted", 0.6315509), (0.1, "strict", 0.5867743), (0.01, "sorted", 1.6507097), (0.01, "strict", 1.6506996)],
)
def test_graded_worked_numbers(temperature, tie_policy, expected):
    """Prevents a wrong tie policy, a division by G, or weights from the wrong softmax."""
    loss = graded(COSINES / temperature, REWARDS, *layout(2, 3), tie_policy=tie_policy)
    assert float(loss.mean()) == pytest.approx(expected, abs=1e-6)
    if (temperature, tie_policy) == (0.1, "strict"):
        assert loss.tolist() == pytest.approx([0.3935097, 0.7800388], abs=1e-6)


@pytest.mark.parametrize(("temperature", "printed"), [(0.1, -0.4423454), (0.01, -6.1075880)])
def test_printed_equation_4_is_why_the_document_stands_in_its_own_denominator(temperature, printed):
    """Prevents the form as printed, without the document itself: it is negative and unbounded below."""
    sim, parts = COSINES / temperature, layout(2, 3)
    loss = naive_graded(sim, REWARDS, *parts, "strict", "by_reward", 1.0, include_self=False)
    assert float(loss.mean()) == pytest.approx(printed, abs=1e-5)
    settings = {"tie_policy": "strict", "position0": "by_reward", "reward_temperature": 1.0}
    found = losses.graded_distillation(sim, parts[0], REWARDS, *parts[1:], **settings, include_self=False)
    torch.testing.assert_close(found, loss.to(found.dtype), rtol=1e-5, atol=1e-5)
    assert (graded(sim, REWARDS, *parts, tie_policy="strict") > 0).all()


def test_contrastive_and_kl_worked_numbers():
    """Prevents a wrong KL direction, a mean over documents, or a temperature on the wrong side."""
    own, same, others = layout(2, 3)
    sim = COSINES / 0.1
    assert float(losses.contrastive(sim, own, same, others).mean()) == pytest.approx(0.5792352, abs=1e-6)
    own_sim = sim.gather(1, own)
    for temperature, expected in ((1.0, 0.2318123), (0.1, 0.4802646)):
        loss = losses.group_kl(own_sim, REWARDS, reward_temperature=temperature)
        assert float(loss.mean()) == pytest.approx(expected, abs=1e-6)
    weights = torch.softmax(REWARDS, dim=1)
    assert weights[0].tolist() == pytest.approx([0.866813, 0.117310, 0.015876], abs=1e-6)


@pytest.mark.parametrize("tie_policy", ["strict", "sorted"])
@pytest.mark.parametrize("position0", ["gold_first", "by_reward"])
def test_one_pass_form_equals_the_loop(tie_policy, position0):
    """Prevents the shared in-batch pass from drifting from the definition under ties, masks and equal texts."""
    generator = torch.Generator().manual_seed(3)
    own, same, others = layout(5, 4)
    sim = torch.randn(5, 20, generator=generator) * 4
    rewards = torch.randint(0, 3, (5, 4), generator=generator).float()
    others &= torch.rand(5, 20, generator=generator) > 0.3
    same[1, 2, 3] = same[1, 3, 2] = True
    loss = graded(sim, rewards, own, same, others, tie_policy, position0, 0.7)
    expected = naive_graded(sim, rewards, own, same, others, tie_policy, position0, 0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_contrastive_is_cross_entropy_where_nothing_is_masked():
    """Prevents losing or doubling a negative: the oracle is torch's cross-entropy over all columns."""
    own, same, others = layout(4, 3)
    sim = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) * 10
    expected = torch.nn.functional.cross_entropy(sim, own[:, 0], reduction="none")
    torch.testing.assert_close(losses.contrastive(sim, own, same, others), expected)


def test_as_printed_a_document_without_negatives_says_nothing():
    """Prevents an infinite loss where the worst document has no in-batch negative either, and NaN in its gradient."""
    own, same, others = layout(1, 3)
    sim = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    rewards = torch.tensor([[2.0, 1.0, 0.0]])
    settings = {"tie_policy": "strict", "position0": "by_reward", "reward_temperature": 1.0, "include_self": False}
    [loss] = losses.graded_distillation(sim, own, rewards, same, others, **settings)
    weights = torch.softmax(rewards[0], dim=0)
    expected = weights[0] * (math.log(math.exp(1) + math.exp(2)) - 3) + weights[1] * (2 - 1)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.isfinite(sim.grad).all()


def test_several_positives_equal_the_loop():
    """Prevents positives that push each other away, and a mean over documents in place of positives."""
    own, same, others = layout(4, 4)
    sim = torch.randn(4, 16, generator=torch.Generator().manual_seed(3)) * 3
    positive = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    same[3, 1, 2] = same[3, 2, 1] = True
    found = losses.contrastive(sim, own, same, others, positive_BG=positive)
    for b in range(4):
        each = []
        for i in range(4):
            if positive[b, i]:
                terms = [sim[b, own[b, j]] for j in range(4) if j == i or not (positive[b, j] or same[b, i, j])]
                terms += [sim[b, c] for c in range(16) if others[b, c]]
                each.append(math.log(sum(math.exp(term) for term in terms)) - float(sim[b, own[b, i]]))
        assert float(found[b]) == pytest.approx(sum(each) / len(each), abs=1e-5)
    torch.testing.assert_close(found[1], losses.contrastive(sim, own, same, others)[1])


def test_marginal_likelihood_equals_the_sum_over_documents():
    """Prevents a mean of logarithms, which is another loss, and a gradient against the document that helps."""
    sim = torch.tensor([[2.0, 1.0, -1.0], [0.5, 0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[-1.0, -3.0, -0.5], [-2.0, -2.0, -2.0]], dtype=torch.float64)
    found = losses.marginal_likelihood(sim, rewards, reward_temperature=0.5, student_temperature=2.0)
    for b in range(2):
        weights = [math.exp(float(s) / 2) for s in sim[b].detach()]
        chance = sum(w / sum(weights) * math.exp(float(r) / 0.5) for w, r in zip(weights, rewards[b], strict=True))
        assert float(found[b].detach()) == pytest.approx(-math.log(chance), abs=1e-9)
    found.sum().backward()
    assert sim.grad[0, 2] < 0 < sim.grad[0, 1]
    assert sim.grad[1].tolist() == pytest.approx([0, 0, 0])


def test_masked_documents_have_no_weight_and_no_gradient():
    """Prevents false negatives from being pushed away, by however little."""
    own, same, others = layout(2, 3)
    others[0, 4] = False
    same[0, 0, 2] = same[0, 2, 0] = True
    sim = (COSINES / 0.1).requires_grad_()
    losses.contrastive(sim, own, same, others)[0].backward()
    assert sim.grad[0, 4] == 0
    assert sim.grad[0, 2] == 0
    assert (sim.grad[0, [1, 3, 5]] > 0).all()
    assert sim.grad[0, 0] < 0


def test_query_without_in_batch_negatives_has_finite_gradient():
    """Prevents NaN from a logsumexp over nothing: one query alone, every in-batch document masked."""
    own, same, others = layout(2, 3)
    others[:] = False
    sim = (COSINES / 0.01).requires_grad_()
    loss = graded(sim, REWARDS, own, same, others).sum() + losses.contrastive(sim, own, same, others).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(sim.grad).all()


def test_group_of_one():
    """Prevents NaN or a gradient out of nothing: without a second document KL is 0, the contrastive loss in-batch."""
    own, same, others = layout(2, 1)
    sim = torch.tensor([[5.0, 1.0], [2.0, 3.0]], requires_grad=True)
    kl = losses.group_kl(sim.gather(1, own), torch.tensor([[2.0], [-1.0]]), reward_temperature=0.1)
    assert kl.tolist() == [0.0, 0.0]
    kl.sum().backward()
    assert (sim.grad == 0).all()
    torch.testing.assert_close(
        graded(sim, torch.zeros(2, 1), own, same, others), losses.contrastive(sim, own, same, others)
    )


def test_equal_rewards():
    """Prevents order from deciding where the LLM has no preference: strict makes no own document a negative."""
    own, same, others = layout(2, 3)
    sim, rewards = COSINES / 0.1, torch.full((2, 3), 7.0).double()
    worse = losses.worse(rewards, tie_policy="strict", position0="gold_first")
    assert not worse.any()
    uniform = torch.full((3,), 1 / 3).double()
    expected = torch.nn.functional.kl_div(torch.log_softmax(sim[0, :3], 0), uniform, reduction="sum")
    assert losses.group_kl(sim.gather(1, own), rewards, reward_temperature=1.0)[0] == pytest.approx(float(expected))
    assert losses.worse(rewards, tie_policy="sorted", position0="by_reward")[0].int().tolist() == [
        [0, 1, 1],
        [0, 0, 1],
        [0, 0, 0],
    ]
    assert torch.isfinite(graded(sim, rewards, own, same, others)).all()


def test_a_better_candidate_never_pushes_the_positive_down_under_gold_first():
    """Prevents a hard negative with a higher reward from taking the gold document as its negative."""
    rewards = torch.tensor([[0.0, 5.0, -1.0]])
    for tie_policy in ("strict", "sorted"):
        worse = losses.worse(rewards, tie_policy=tie_policy, position0="gold_first")[0]
        assert worse[0].tolist() == [False, True, True]
        assert worse[1].tolist() == [False, False, True]
        assert losses.worse(rewards, tie_policy=tie_policy, position0="by_reward")[0][1].tolist() == [True, False, True]


def test_extreme_rewards_give_zero_times_log_zero_without_nan():
    """Prevents 0 * log 0 = NaN when the teacher is certain, and overflow at cos / 0.01."""
    sim = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True)
    loss = losses.group_kl(sim, torch.tensor([[500.0, -500.0, 0.0]]), reward_temperature=0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(sim.grad).all()


def test_unknown_tie_policy_is_refused():
    """Prevents a typo from silently choosing the other policy."""
    with pytest.raises(ValueError, match="tie_policy"):
        losses.worse(REWARDS, tie_policy="loose", position0="gold_first")


# --- LLM-R -----------------------------------------------------------------------------------------------------------

LLMR_QUERIES = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [0.1, 1.0]], dtype=torch.float64))
LLMR_DOCS = torch.nn.functional.normalize(
    torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.9], [-0.3, 1.0]], dtype=torch.float64)
)


def further(queries, positives, temperature):
    """Positive-query, query-query and positive-positive similarities, and which are of others."""
    parts = [positives @ queries.T, queries @ queries.T, positives @ positives.T]
    other = ~torch.eye(len(queries), dtype=torch.bool)
    return torch.cat(parts, dim=1) / temperature, other.repeat(1, 3)


def test_llm_r_worked_numbers():
    """Prevents a missing block, self pairs among the negatives, or a wrong weight between the two terms."""
    own, same, others = layout(2, 2)
    sim = LLMR_QUERIES @ LLMR_DOCS.T / 0.1
    contrast = losses.full_contrastive(sim, own, same, others, *further(LLMR_QUERIES, LLMR_DOCS[::2], 0.1)).mean()
    kl = losses.group_kl(
        sim.gather(1, own), torch.tensor([[2.0, -1.0], [0.5, 0.0]], dtype=torch.float64), reward_temperature=1.0
    ).mean()
    assert float(contrast) == pytest.approx(0.3323606, abs=1e-6)
    assert float(kl) == pytest.approx(0.0339605, abs=1e-6)
    assert float(kl + 0.2 * contrast) == pytest.approx(0.1004326, abs=1e-6)


def test_full_contrastive_equals_the_loop():
    generator = torch.Generator().manual_seed(7)
    own, same, others = layout(4, 3)
    sim, more = (torch.randn(4, size, generator=generator) * 3 for size in (12, 12))
    kept = torch.rand(4, 12, generator=generator) > 0.4
    others &= torch.rand(4, 12, generator=generator) > 0.3
    same[2, 0, 1] = same[2, 1, 0] = True
    for b, loss in enumerate(losses.full_contrastive(sim, own, same, others, more, kept).tolist()):
        terms = [float(sim[b, own[b, 0]])]
        terms += [float(sim[b, own[b, j]]) for j in (1, 2) if not same[b, 0, j]]
        terms += [float(sim[b, c]) for c in range(12) if others[b, c]]
        terms += [float(more[b, x]) for x in range(12) if kept[b, x]]
        assert loss == pytest.approx(math.log(sum(map(math.exp, terms))) - terms[0], abs=1e-5)


def test_full_contrastive_of_one_query_is_the_contrastive_loss():
    """Prevents NaN: with one query no other queries or positives exist."""
    own, same, others = layout(1, 3)
    sim = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    loss = losses.full_contrastive(sim, own, same, others, torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, losses.contrastive(sim, own, same, others))
    loss.sum().backward()
    assert torch.isfinite(sim.grad).all()


# --- REPLUG and the forms of a teacher --------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "expected"), [("student_teacher", 0.204307), ("teacher_student", 0.265677)])
def test_replug_worked_numbers(direction, expected):
    """Prevents the likelihood's logarithm where the formula has the probability, and a direction that is swapped."""
    loss = losses.group_kl(
        torch.tensor([[0.9, 0.7, 0.5]], dtype=torch.float64),
        torch.tensor([[0.30, 0.25, 0.10]], dtype=torch.float64).log(),
        reward_temperature=0.1,
        reward_form="exp",
        student_temperature=0.1,
        direction=direction,
    )
    assert float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_kl_equals_its_definition_and_vanishes_only_at_the_teacher(direction):
    generator = torch.Generator().manual_seed(1)
    sim, rewards = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher, student = torch.softmax(rewards / 0.5, 1), torch.softmax(sim, 1)
    p, q = (teacher, student) if direction == "teacher_student" else (student, teacher)
    loss = losses.group_kl(sim, rewards, reward_temperature=0.5, direction=direction)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(1))
    same = losses.group_kl(rewards / 0.5, rewards, reward_temperature=0.5, direction=direction)
    torch.testing.assert_close(same, torch.zeros_like(same))


def test_standardised_rewards_do_not_know_scale_or_offset():
    """Prevents one temperature from meaning another sharpness for each query; equal rewards must not become NaN."""
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.1, 0.1, 0.1]])
    for form in ("zscore", "minmax"):
        scores = losses.teacher_scores(rewards, form)
        torch.testing.assert_close(scores, losses.teacher_scores(rewards * 7 - 3, form), rtol=1e-4, atol=1e-5)
        assert scores[1].tolist() == [0.0, 0.0, 0.0]
    zscores = losses.teacher_scores(rewards, "zscore")[0]
    assert float(zscores.mean()) == pytest.approx(0, abs=1e-6)
    assert float(zscores.pow(2).mean()) == pytest.approx(1, abs=1e-5)
    assert losses.teacher_scores(rewards, "minmax")[0].tolist() == pytest.approx([0, 1 / 3, 1])


# --- graded labels ----------------------------------------------------------------------------------------------------


def test_listwise_of_labels_without_weight_and_of_no_negatives_is_zero():
    """Prevents one query of pseudo-labels that weigh nothing from making the gradient of the whole batch NaN."""
    sim = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    own, labels = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    same, nobody = torch.eye(2, dtype=torch.bool).expand(2, -1, -1), torch.zeros(2, 4, dtype=torch.bool)
    weights = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    loss = losses.listwise(sim, own, labels, same, nobody, label_temperature=0.2, weights_BG=weights)
    loss.sum().backward()
    assert loss[0] == 0 < loss[1]
    assert sim.grad[0].tolist() == [0, 0, 0, 0]
    assert sim.grad[1].isfinite().all()


def test_listwise_equals_the_loop():
    generator = torch.Generator().manual_seed(5)
    own, same, others = layout(3, 4)
    sim = torch.randn(3, 12, generator=generator) * 3
    labels = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.5, 0.5, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    others &= torch.rand(3, 12, generator=generator) > 0.3
    same[1, 0, 1] = same[1, 1, 0] = True
    loss = losses.listwise(sim, own, labels, same, others, label_temperature=0.2)
    for b, counted in ((0, [0, 1, 2, 3]), (1, [0, 2, 3])):
        weights = [math.exp(float(labels[b, i]) / 0.2) for i in counted]
        scores = [float(sim[b, own[b, i]]) for i in counted]
        total = math.log(
            sum(map(math.exp, scores)) + sum(math.exp(float(sim[b, c])) for c in range(12) if others[b, c])
        )
        expected = sum(w / sum(weights) * (total - s) for w, s in zip(weights, scores, strict=True))
        assert float(loss[b]) == pytest.approx(expected, abs=1e-5)
    assert float(loss[2]) == 0, "labels of 0 alone do not say what is relevant"


def test_a_label_of_weight_n_counts_as_n_documents():
    """Prevents pseudo-labels from having the say of the LLM's, in the target and in the pairs."""
    own, same, _ = layout(1, 3)
    sim = torch.tensor([[0.5, -1.0, 2.0]])
    labels, weights = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[1.0, 0.5, 0.25]])
    # Four documents for weight 1, two for 1/2 and one for 1/4, all of weight 1, are the same list.
    copies = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    own_7, same_7, _ = layout(1, 7)
    none = torch.zeros(1, 7, dtype=torch.bool)
    settings = {"label_temperature": 0.2}
    found = losses.listwise(sim, own, labels, same, none[:, :3], **settings, weights_BG=weights)
    copied = losses.listwise(sim[:, copies], own_7, labels[:, copies], same_7, none, **settings)
    target = [math.exp(label / 0.2) for label in (1.0, 0.5, 0.0)]
    say = sum(t * float(w) for t, w in zip(target, weights[0], strict=True)) / sum(target)
    # The copies make all of the denominator four times what the weights make of it.
    assert found.item() == pytest.approx(say * (copied.item() - math.log(4)), abs=1e-6)
    pairs = [(0, 1, 0.5 * 1.0 * 0.5), (0, 2, 1.0 * 1.0 * 0.25), (1, 2, 0.5 * 0.5 * 0.25)]
    each = [share * math.log1p(math.exp(-float(sim[0, i] - sim[0, j]))) for i, j, share in pairs]
    assert float(losses.pairwise(sim, labels, weights_BG=weights)[0]) == pytest.approx(sum(each) / 3, abs=1e-6)


def listwise_gradient(sim, labels, weights, others=None):
    """Of the loss of one query in double precision, and by finite differences."""
    own, same, _ = layout(1, labels.shape[1])
    others = torch.zeros(1, sim.shape[1], dtype=torch.bool) if others is None else others

    def loss(at):
        settings = {"label_temperature": 0.2, "weights_BG": weights}
        return losses.listwise(at, own, labels, same, others, **settings).sum()

    sim = sim.double().requires_grad_()
    loss(sim).backward()
    steps = torch.eye(sim.shape[1], dtype=torch.float64) * 1e-5
    return sim.grad[0], torch.stack([(loss(sim.detach() + step) - loss(sim.detach() - step)) / 2e-5 for step in steps])


def test_a_label_of_less_weight_pulls_and_pushes_less():
    """Prevents weights that leave the gradient as it was, or raise it: formerly .1186 became .1217."""
    labels = torch.tensor([[1.0] + [0.0] * 7], dtype=torch.float64)
    even, one = torch.zeros(1, 8), torch.ones(1, 8, dtype=torch.float64)
    plain, _ = listwise_gradient(even, labels, one)
    assert plain[1:].tolist() == pytest.approx([1 / 8 - 1 / (math.exp(5) + 7)] * 7)
    pseudo_zeros, differences = listwise_gradient(even, labels, torch.where(labels == 0, 0.5, 1.0))
    assert torch.allclose(pseudo_zeros, differences, atol=1e-8)
    # Beside each other zeros share the push: were they one of 7 pairs each, it would be the half.
    assert pseudo_zeros[1:].tolist() == pytest.approx([0.1054] * 7, abs=1e-4)
    pseudo_one, differences = listwise_gradient(even, labels, torch.where(labels == 1, 0.5, 1.0))
    assert torch.allclose(pseudo_one, differences, atol=1e-8)
    assert 0.5 < (pseudo_one[0] / plain[0]).item() < 0.6
    halved, _ = listwise_gradient(even, labels, 0.5 * one)
    assert torch.allclose(halved, 0.5 * plain), "without in-batch negatives half of all weights is half of the loss"
    generator = torch.Generator().manual_seed(2)
    sim, weights = torch.randn(1, 12, generator=generator) * 3, torch.rand(1, 8, generator=generator)
    mixed = torch.tensor([[1.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.5, 0.0]], dtype=torch.float64)
    others = torch.tensor([[False] * 8 + [True] * 4])
    found, differences = listwise_gradient(sim, mixed, weights.double(), others)
    assert torch.allclose(found, differences, atol=1e-7)


def test_weights_of_one_change_nothing():
    own, same, others = layout(2, 3)
    labels = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.0, 0.0]])
    sim = (COSINES / 0.05).float()
    found = [
        losses.listwise(sim, own, labels, same, others, label_temperature=0.2, weights_BG=weights)
        for weights in (None, torch.ones(2, 3))
    ]
    assert found[0].tolist() == found[1].tolist()


def test_labels_without_weight_teach_nothing():
    """Prevents a NaN where no label above 0 has weight, and with it the loss of the whole batch."""
    own, same, others = layout(2, 3)
    sim = (COSINES / 0.1).requires_grad_()
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    weights = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    loss = losses.listwise(sim, own, labels, same, others, label_temperature=0.2, weights_BG=weights)
    loss = loss + losses.pairwise(sim.gather(1, own), labels, weights_BG=weights)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert (sim.grad[0] == 0).all()
    assert torch.isfinite(sim.grad).all()
    assert (sim.grad[1] != 0).any()


def test_query_without_relevant_document_moves_nothing():
    own, same, others = layout(2, 3)
    sim = (COSINES / 0.1).requires_grad_()
    labels = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    losses.listwise(sim, own, labels, same, others, label_temperature=0.2).sum().backward()
    assert (sim.grad[0] == 0).all()
    assert (sim.grad[1] != 0).any()


def test_pairwise_equals_the_loop():
    sim = torch.tensor([[0.3, -1.0, 2.0], [0.0, 1.0, 2.0]])
    labels = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]])
    each = [
        (float(labels[0, i] - labels[0, j])) * math.log1p(math.exp(-float(sim[0, i] - sim[0, j])))
        for i in range(3)
        for j in range(3)
        if labels[0, i] > labels[0, j]
    ]
    assert losses.pairwise(sim, labels).tolist() == pytest.approx([sum(each) / len(each), 0.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_widened(dtype):
    """Prevents overflow and a softmax that cannot tell: cosines over 0.01 span 200."""
    own, same, others = layout(2, 3)
    sim, rewards = (COSINES / 0.01).to(dtype), REWARDS.to(dtype)
    found = [
        losses.full_contrastive(sim, own, same, others, sim, others),
        losses.group_kl(sim.gather(1, own), rewards, reward_temperature=0.1, direction="student_teacher"),
        losses.marginal_likelihood(sim.gather(1, own), -rewards, reward_temperature=0.1),
        losses.listwise(sim, own, rewards, same, others, label_temperature=0.2),
        losses.pairwise(sim.gather(1, own), rewards),
    ]
    for loss in found:
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss).all()


def test_documents_without_a_reward_have_no_weight_in_distillation():
    """0 * log 0 is NaN, and one candidate of another task would end the training (methods.md B.4, I.4)."""
    sim = torch.tensor([[0.9, 0.2, 0.5, 0.1]], requires_grad=True)
    rewards = torch.tensor([[-1.0, -2.0, -torch.inf, -torch.inf]])
    loss = losses.group_kl(sim, rewards, reward_temperature=1.0)
    teacher, student = torch.tensor([-1.0, -2.0]).softmax(0), sim[0].detach().softmax(0)
    expected = sum(float(t * (t.log() - s.log())) for t, s in zip(teacher, student[:2], strict=True))
    assert loss.item() == pytest.approx(expected)
    loss.sum().backward()
    assert torch.allclose(sim.grad[0], student - torch.tensor([*teacher, 0.0, 0.0]))
    own, same, others = layout(1, 4)
    for tie_policy in ("strict", "sorted"):
        assert torch.isfinite(graded(sim, rewards, own, same, others, tie_policy=tie_policy)).all()


def test_cross_entropy_of_a_group_against_a_loop():
    """Prevents a document that stands twice from counting twice, or as the positive's own negative."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    keys = torch.randint(0, 4, (6, 5), generator=generator)
    same = keys[:, :, None] == keys[:, None, :]
    found = losses.group_cross_entropy(logits, same)
    for row, values in enumerate(logits.tolist()):
        first = [place for place in range(5) if keys[row, place] not in keys[row, :place]]
        expected = math.log(sum(math.exp(values[place]) for place in first)) - values[0]
        assert found[row].item() == pytest.approx(expected, rel=1e-6)
    found.sum().backward()
    assert not logits.grad[:, 1:][same[:, 0, 1:]].any()
    alone = torch.eye(8, dtype=torch.bool)[None]
    assert losses.group_cross_entropy(torch.zeros(1, 8), alone).item() == pytest.approx(math.log(8))
