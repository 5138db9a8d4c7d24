"""Fewer key-value heads: which heads share one, what the shared one is, and how queries and output adapt to it.

Ainslie et al. 2023 (GQA) make each group's key and value projection the mean of its heads' and train on. Here:

    group    by position (neighbours, as the paper), or by similarity: the sum over groups of the squared differences of the
             heads' keys and values on calibration data, each made relative, lowered from the grouping by position by
             exchanging two heads at a time until no exchange helps
    merge    mean; first (of each group); or least squares. With all keys of a group as columns of one matrix, the best
             shared head is a factor of its truncated singular value decomposition. Values may be mixed by any matrix
             afterwards, since the output projection follows: the rank is D of n D columns. Keys may only be changed by what
             commutes with the rotary embedding: each pair of channels is a complex number, the decomposition is of rank 1
             for each pair, and the queries are multiplied by the conjugate of each head's factor (`Attention.turns`, proven).
             Keys are weighted by the energy of the queries that meet them, values by what the output projection makes of them.
    refit    the output projection, by ridge regression from what now reaches it to what the original would answer to the same
             hidden states; the ridge pulls towards the merged weights, so the error on the data is never larger than theirs.
             Refused: what the original answered to its own hidden states. It cannot be reached from others, and a
             regression that tries shrinks everything (SmolLM2, three blocks to MQA: KL 0.43 against 0.08)

Everything but the refit needs one Gram matrix X^T X of the attention's input with a column of ones for the biases: moments of
keys and values are quadratic forms in it. The mean is among the candidates of the least squares (all factors 1), which hence is
never worse on the data. Where heads are normed after projection (`turns` is None) keys are merged by their mean.

Legend: H query heads, G key-value heads, N new ones, S heads of a group, D channels of a head, F pairs of channels,
I input columns and the bias, C hidden width, T tokens. All float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.errors import UsageError
from infopt.heads import Attention, HeadWeights, turned

Groups = tuple[tuple[int, ...], ...]
_DAMPING = 1e-2  # of the ridge, relative to the mean of the diagonal


class InputGram:
    """X^T X of an attention's input with a column of ones, summed over tokens; `matrix` is its mean [I, I]."""

    def __init__(self, width: int) -> None:
        self.tokens = 0
        self._sum_II = torch.zeros(width + 1, width + 1)

    def add(self, x: Tensor) -> None:
        x_TC = x.reshape(-1, x.shape[-1]).float()
        x_TI = torch.cat([x_TC, torch.ones(len(x_TC), 1)], 1)
        self._sum_II.addmm_(x_TI.T, x_TI)
        self.tokens += len(x_TI)

    @property
    def matrix(self) -> Tensor:
        return self._sum_II.double() / max(self.tokens, 1)


@dataclass(frozen=True)
class Moments:
    """Second moments of all heads' keys and values [G, D, G, D], and each query head's energy by channel [H, D]."""

    key_GDGD: Tensor
    value_GDGD: Tensor
    query_HD: Tensor

    @staticmethod
    def of(weights: HeadWeights, gram_II: Tensor) -> Moments:
        return Moments(
            _moments(weights.k_GDI, gram_II),
            _moments(weights.v_GDI, gram_II),
            ((weights.q_HDI @ gram_II) * weights.q_HDI).sum(-1),
        )


def check_heads(have: int, wanted: int) -> None:
    """UsageError unless so many key-value heads can be grouped evenly."""
    if wanted > have or have % wanted:
        fits = [n for n in range(1, have + 1) if have % n == 0]
        raise UsageError(
            f"--kv-heads {wanted}",
            f"the model has {have} key-value heads, and groups of them must be equal",
            f"one of --kv-heads {', '.join(map(str, fits))}",
        )


# Which heads share one


def by_position(heads: int, wanted: int) -> Groups:
    """Neighbours."""
    size = heads // wanted
    return tuple(tuple(range(start, start + size)) for start in range(0, heads, size))


def by_similarity(distance_GG: Tensor, wanted: int) -> Groups:
    """Exchange heads between the groups of `by_position` while that lowers `spread`; the same groups if nothing does."""
    distance = distance_GG.tolist()
    groups = [list(group) for group in by_position(len(distance), wanted)]
    place = {head: number for number, group in enumerate(groups) for head in group}

    def pull(head: int, number: int) -> float:
        return sum(distance[head][other] for other in groups[number] if other != head)

    improved = len(groups[0]) > 1
    while improved:
        improved = False
        for one in range(len(distance)):
            for two in range(one + 1, len(distance)):
                a, b = place[one], place[two]
                if a == b:
                    continue
                before = pull(one, a) + pull(two, b)
                after = pull(one, b) + pull(two, a) - 2 * distance[one][two]
                if after < before - 1e-9 * abs(before):
                    groups[a][groups[a].index(one)], groups[b][groups[b].index(two)] = two, one
                    place[one], place[two] = b, a
                    improved = True
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def spread(distance_GG: Tensor, groups: Groups) -> float:
    """The objective of a grouping: the mean distance of the pairs of each group to one another, times its size."""
    total = sum(float(distance_GG[one, two]) for group in groups for one in group for two in group if one < two)
    return total / len(groups[0])


def distances(weights: HeadWeights, moments: Moments, attention: Attention, merge: str) -> Tensor:
    """[G, G]: what is lost when two heads share one, keys and values each relative to all there is of them.

    merge: "lstsq" asks what the decomposition of the two leaves over, any other half their squared difference.
    """
    heads = attention.kv_heads
    lost_2GG = torch.zeros(2, heads, heads, dtype=torch.float64)
    all_2 = torch.zeros(2, dtype=torch.float64)
    energy_GF, scale_GDD = _energy(moments, attention), _output_scale(weights, attention)
    for one in range(heads):
        all_2 += torch.tensor([_variance(m, one) for m in (moments.key_GDGD, moments.value_GDGD)])
        for two in range(one + 1, heads):
            if merge == "lstsq":
                key = _share_keys(moments, attention, (one, two), energy_GF)
                value = _share_values(moments, (one, two), scale_GDD)
                lost_2GG[:, one, two] = torch.tensor([key.lost, value.lost])
            else:
                pairs = (moments.key_GDGD, moments.value_GDGD)
                lost_2GG[:, one, two] = torch.tensor([_difference(m, one, two) for m in pairs])
    if merge == "lstsq":
        all_2 = torch.tensor([_weighted_keys(moments, attention, energy_GF), _weighted_values(moments, scale_GDD)])
    relative_GG = (lost_2GG / all_2.clamp(min=1e-30)[:, None, None]).sum(0)
    return relative_GG + relative_GG.T


# What the shared head is


@dataclass(frozen=True)
class Shared:
    """How a group becomes one head: it is the sum of `mix` times each head, and each head is then about `follow` times it.
    Complex [S, F] for keys, real [S, D, D] for values. lost: the weighted squared error that remains."""

    mix: Tensor
    follow: Tensor
    lost: float


@dataclass(frozen=True)
class Regrouped:
    """The new weights, and for keys and values what part of their (weighted) variance the least squares could not keep."""

    weights: HeadWeights
    lost_keys: float | None = None
    lost_values: float | None = None


def regroup(
    weights: HeadWeights, attention: Attention, target: Attention, groups: Groups, merge: str, moments: Moments | None
) -> Regrouped:
    """The weights with one key-value head for each group, ordered as `target` has its heads.

    moments: of these weights; least squares needs them. Groups of one head keep their weights bit for bit.
    """
    new_k, new_v = [], []
    q_HDI, o_HCD = weights.q_HDI.clone(), weights.o_HCD.clone()
    lost_keys = lost_values = 0.0
    fit = moments if merge == "lstsq" else None
    energy_GF = None if fit is None else _energy(fit, attention)
    scale_GDD = None if fit is None else _output_scale(weights, attention)
    for group in groups:
        k_SDI, v_SDI = weights.k_GDI[list(group)], weights.v_GDI[list(group)]
        if fit is None or energy_GF is None or scale_GDD is None or len(group) == 1:
            new_k.append(k_SDI[0] if merge == "first" or len(group) == 1 else k_SDI.mean(0))
            new_v.append(v_SDI[0] if merge == "first" or len(group) == 1 else v_SDI.mean(0))
            continue
        keys = _share_keys(fit, attention, group, energy_GF)
        values = _share_values(fit, group, scale_GDD)
        turns = attention.turns
        new_k.append(k_SDI.mean(0) if turns is None else turned(k_SDI, turns, keys.mix).sum(0))
        new_v.append((values.mix @ v_SDI).sum(0))
        for number, kv_head in enumerate(group):
            for head in attention.queries_of(kv_head):
                if turns is not None:
                    undo_F = keys.follow[number].conj().resolve_conj()
                    q_HDI[head] = turned(weights.q_HDI[head], turns, undo_F)
                o_HCD[head] = weights.o_HCD[head] @ values.follow[number]
        lost_keys, lost_values = lost_keys + keys.lost, lost_values + values.lost
    order = _query_order(attention, target, groups)
    made = HeadWeights(q_HDI[order], torch.stack(new_k), torch.stack(new_v), o_HCD[order])
    if fit is None or energy_GF is None or scale_GDD is None:
        return Regrouped(made)
    return Regrouped(
        made,
        lost_keys / max(_weighted_keys(fit, attention, energy_GF), 1e-30),
        lost_values / max(_weighted_values(fit, scale_GDD), 1e-30),
    )


def _query_order(attention: Attention, target: Attention, groups: Groups) -> list[int]:
    """For each query head of the target, the old one that goes there."""
    order = [0] * len(target.group)
    for number, group in enumerate(groups):
        sources = [head for kv_head in group for head in attention.queries_of(kv_head)]
        for place, source in zip(target.queries_of(number), sources, strict=True):
            order[place] = source
    return order


def _share_keys(moments: Moments, attention: Attention, group: Sequence[int], energy_GF: Tensor) -> Shared:
    """The best rank 1 for each pair of channels, over the group's heads; factors of 1 (the mean) without turns."""
    picked = list(group)
    c_FSS = _complex_moments(moments, attention)[:, picked][:, :, picked]
    root_FS = energy_GF[picked].T.clamp(min=1e-30).sqrt()
    if attention.turns is None:
        mix_SF = torch.full(root_FS.T.shape, 1 / len(picked), dtype=c_FSS.dtype)
        follow_SF = torch.ones_like(mix_SF)
    else:
        weighted_FSS = root_FS[:, :, None] * c_FSS * root_FS[:, None, :]
        first_FS = torch.linalg.eigh(weighted_FSS).eigenvectors[..., -1]
        mix_FS = first_FS.conj().resolve_conj() * root_FS
        own_F = torch.einsum("fs,fst,ft->f", mix_FS, c_FSS, mix_FS.conj()).real.clamp(min=1e-30)
        follow_FS = torch.einsum("fst,ft->fs", c_FSS, mix_FS.conj()) / own_F[:, None]
        # The shared key is free up to a complex factor: give it the size of the heads, and the phase nearest to theirs.
        total_F = follow_FS.sum(1)
        phase_F = torch.where(total_F.abs() > 1e-30, total_F / total_F.abs().clamp(min=1e-30), torch.ones_like(total_F))
        gauge_F = phase_F * follow_FS.abs().square().mean(1).sqrt().clamp(min=1e-30)
        mix_SF, follow_SF = (mix_FS * gauge_F[:, None]).T, (follow_FS / gauge_F[:, None]).T
    # error of head s: k_s - follow_s * sum_t mix_t k_t
    error_FSS = torch.eye(len(picked)) - follow_SF.T[:, :, None] * mix_SF.T[:, None, :]
    left_FS = torch.einsum("fst,ftu,fsu->fs", error_FSS, c_FSS, error_FSS.conj()).real
    return Shared(mix_SF, follow_SF, float((left_FS * energy_GF[picked].T).sum().clamp(min=0)))


def _share_values(moments: Moments, group: Sequence[int], scale_GDD: Tensor) -> Shared:
    """The best D columns for all values of the group, as the output projection weighs them."""
    picked = list(group)
    count, width = len(picked), scale_GDD.shape[-1]
    m_SDSD = moments.value_GDGD[picked][:, :, picked]
    weighted = torch.einsum("sde,setf,tfg->sdtg", scale_GDD[picked], m_SDSD, scale_GDD[picked])
    values, vectors = torch.linalg.eigh(weighted.reshape(count * width, count * width))
    basis_SDE = vectors[:, -width:].reshape(count, width, width)
    mix_SED = torch.einsum("sde,sdf->sef", basis_SDE, scale_GDD[picked])  # scale is symmetric
    own_E = values[-width:]
    seen_SDE = torch.einsum("sdtf,tef->sde", m_SDSD, mix_SED)  # covariance of each head with the shared one
    follow_SDE = torch.where(own_E > 1e-10 * own_E[-1].clamp(min=1e-30), seen_SDE / own_E.clamp(min=1e-30), 0.0)
    gauge = follow_SDE.square().mean().sqrt().clamp(min=1e-30) * width**0.5
    return Shared(mix_SED * gauge, follow_SDE / gauge, float(values[:-width].clamp(min=0).sum()))


def _energy(moments: Moments, attention: Attention) -> Tensor:
    """[G, F]: the energy of the queries that meet each pair of a key head's channels; equal weights without turns."""
    turns = attention.turns
    if turns is None:
        return torch.ones(attention.kv_heads, moments.query_HD.shape[1], dtype=torch.float64)
    a_F, b_F = torch.tensor(turns).T
    e_HD = moments.query_HD
    e_HF = e_HD[:, a_F] + torch.where(a_F == b_F, 0.0, e_HD[:, b_F])
    out_GF = torch.zeros(attention.kv_heads, len(turns), dtype=torch.float64)
    return out_GF.index_add_(0, torch.tensor(attention.group), e_HF)


def _output_scale(weights: HeadWeights, attention: Attention) -> Tensor:
    """[G, D, D]: the symmetric root of what the output projection makes of each value head."""
    out = []
    for kv_head in range(attention.kv_heads):
        o_XCD = weights.o_HCD[attention.queries_of(kv_head)]
        values_D, vectors_DD = torch.linalg.eigh(torch.einsum("xcd,xce->de", o_XCD, o_XCD))
        root_D = values_D.clamp(min=float(values_D[-1].clamp(min=1e-30)) * 1e-8).sqrt()
        out.append((vectors_DD * root_D) @ vectors_DD.T)
    return torch.stack(out)


def _complex_moments(moments: Moments, attention: Attention) -> Tensor:
    """[F, G, G]: E[z_g conj(z_h)] of each pair of channels; of each channel alone without turns."""
    width = moments.key_GDGD.shape[1]
    turns = attention.turns or tuple((d, d) for d in range(width))
    a_F, b_F = torch.tensor(turns).T
    m_DDGG = moments.key_GDGD.permute(1, 3, 0, 2)
    pair_F = (a_F != b_F)[:, None, None]
    real = m_DDGG[a_F, a_F] + torch.where(pair_F, m_DDGG[b_F, b_F], 0.0)
    imag = torch.where(pair_F, m_DDGG[b_F, a_F] - m_DDGG[a_F, b_F], 0.0)
    return torch.complex(real, imag)


def _weighted_keys(moments: Moments, attention: Attention, energy_GF: Tensor) -> float:
    own_FG = _complex_moments(moments, attention).diagonal(dim1=1, dim2=2).real
    return float((own_FG * energy_GF.T).sum())


def _weighted_values(moments: Moments, scale_GDD: Tensor) -> float:
    own_GDD = torch.stack([moments.value_GDGD[g, :, g] for g in range(len(scale_GDD))])
    return float(torch.einsum("gde,gef,gfd->", scale_GDD, own_GDD, scale_GDD))


def _variance(moments_GDGD: Tensor, head: int) -> float:
    return float(moments_GDGD[head, :, head].trace())


def _difference(moments_GDGD: Tensor, one: int, two: int) -> float:
    cross = float(moments_GDGD[one, :, two].trace())
    return 0.5 * max(_variance(moments_GDGD, one) + _variance(moments_GDGD, two) - 2 * cross, 0.0)


def _moments(rows_GDI: Tensor, gram_II: Tensor) -> Tensor:
    flat = rows_GDI.reshape(-1, rows_GDI.shape[-1])
    return (flat @ gram_II @ flat.T).view(*rows_GDI.shape[:2], *rows_GDI.shape[:2])


# The output projection again


class OutputFit:
    """Ridge regression of an output projection: `add` what reaches it and what it should answer, then `solve`. The error is
    relative to the size of each token's answer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._zz, self._zy = torch.zeros(inputs, inputs), torch.zeros(inputs, outputs)

    def add(self, z: Tensor, y: Tensor) -> None:
        """z [..., X] reaches the projection, y [..., C] is wanted (without its bias)."""
        size = y.float().norm(dim=-1, keepdim=True).clamp(min=1e-9)
        z_TX, y_TC = (z.float() / size).reshape(-1, z.shape[-1]), (y.float() / size).reshape(-1, y.shape[-1])
        self._zz.addmm_(z_TX.T, z_TX)
        self._zy.addmm_(z_TX.T, y_TC)

    def solve(self, w0_CX: Tensor) -> Tensor:
        """[C, X] fp32: the minimum of |Z W^T - Y|^2 + d |W - W0|^2. Its first term is never above that of W0."""
        zz, zy = self._zz.double(), self._zy.double()
        damping = _DAMPING * zz.diagonal().mean().clamp(min=1e-30)
        left = zz + damping * torch.eye(len(zz), dtype=zz.dtype)
        return torch.linalg.solve(left, zy + damping * w0_CX.double().T).T.float()
