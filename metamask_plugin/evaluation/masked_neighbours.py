"""Nearest neighbours by cosine under binary masks, from what is known of all dimensions."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

# share of an image's squared length that must be left for the dropped part to be subtracted: what is left
# is divided by it, and so are float32's roundings
MIN_ENERGY = 0.1

# share of images with a nearest neighbour far down the unmasked order above which that order is no help
MAX_MISSED = 0.3


class MaskedNeighbours:
    """Search for the nearest neighbours under a mask, among a bank that is prepared once."""

    def __init__(self, bank: torch.Tensor, feats: torch.Tensor, k: int):
        bank, feats = F.normalize(bank.float(), dim=1), F.normalize(feats.float(), dim=1)
        self.size, self.k = len(bank), min(k, len(bank))
        # groups of sqrt(M / k) make _search's two searches equally long
        self.group = max(1, round((self.size / self.k) ** 0.5))
        self.groups = -(-self.size // self.group)
        self.padded_size = self.group * self.groups
        bank = F.pad(bank, (0, 0, 0, self.padded_size - self.size))
        # by dimension, so that a mask takes whole rows; the last is for masks with fewer of them
        self.bank, self.feats = F.pad(bank.T, (0, 0, 0, 1)), F.pad(feats.T, (0, 0, 0, 1))
        self.bank_energy, self.feats_energy = bank.square(), feats.square()
        self.bank_total, self.feats_total = self.bank_energy.sum(dim=1), self.feats_energy.sum(dim=1)

    def plan(self, masks: torch.Tensor, together: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
        """Yields chunks of masks as :func:`plan_masks` does, each with the side that is cheap and exact."""
        energy = torch.cat([self.bank_energy, self.feats_energy])
        # some masks at a time: the product is as large as their number times that of all images
        lost = [((~some).to(energy) @ energy.T).amax(dim=1).cpu() for some in masks.split(256)]
        few = masks.sum(dim=1) * 2 < masks.shape[1]
        return plan_masks(masks, few | (torch.cat(lost) > 1 - MIN_ENERGY), lambda width: together)

    def unmasked(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines (n, M) with all dimensions, and where the largest of them are (n, c)."""
        self.reordered = False
        similarity = self.feats[:, rows].T @ self.bank
        similarity[:, self.size :] = -torch.inf
        return similarity, similarity.topk(min(self.size, max(64, 4 * self.k)), dim=1, sorted=False).indices

    def nearest(
        self,
        rows: slice,
        full: torch.Tensor,
        near: torch.Tensor,
        columns: torch.Tensor,
        kept: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorted cosines (r, n, k) and bank indices of the images ``rows``.

        Args:
            rows: some of the test images.
            full: their cosines, of :meth:`unmasked`.
            near: the largest of those, of :meth:`unmasked`.
            columns: the dimensions that each of r masks keeps or drops, (r, c); D is none.
            kept: which of both.
        """
        columns = columns.to(full.device)
        feats, bank = self.feats[columns][:, :, rows], self.bank[columns]
        norms = [
            self._inverse_norm(part.square().sum(dim=1), None if kept else total)
            for part, total in ((feats, self.feats_total[rows]), (bank, self.bank_total))
        ]
        # the image's own length changes no order, so it is divided by at the end
        inverse_norm = norms[1][:, None]
        part = feats.mT, bank * (inverse_norm if kept else -inverse_norm)
        if kept:
            similarity = torch.bmm(*part)
            similarity[..., self.size :] = -torch.inf
        else:
            similarity = torch.bmm(*part).addcmul_(full, inverse_norm)
        if kept or self.reordered:
            values, indices = self._search(similarity)
        else:
            values, indices = self._search_near(similarity, near)
        return values * norms[0][..., None], indices

    def _search_near(self, similarity: torch.Tensor, near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest (r, n, k), sought among ``near`` (n, c), and where they are not all, everywhere.

        A few dropped dimensions hardly reorder the bank. That nothing outside of ``near`` is larger is seen
        from one maximum, which is a tenth of the work of a search. Overwrites ``similarity``.
        """
        near = near.expand(len(similarity), -1, -1)
        values, places = similarity.gather(2, near).topk(self.k, dim=2)
        indices = near.gather(2, places)
        similarity.scatter_(2, near, -torch.inf)
        missed = similarity.amax(dim=2) > values[..., -1]
        # masks come in order of what they drop: the next ones would miss more
        self.reordered = float(missed.float().mean()) > MAX_MISSED
        if missed.any():
            others, their_indices = self._search(similarity[missed])
            both = torch.cat([values[missed], others], dim=1)
            both_indices = torch.cat([indices[missed], their_indices], dim=1)
            values[missed], places = both.topk(self.k, dim=1)
            indices[missed] = both_indices.gather(1, places)
        return values, indices

    def _search(self, similarity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest of the last dimension, sorted, and their indices.

        They all lie in the k groups with the largest maxima, so two searches, among the groups and in
        k of them, replace one in the whole bank.
        """
        grouped = similarity.unflatten(-1, (self.group, self.groups))
        best = grouped.amax(dim=-2).topk(self.k, dim=-1, sorted=False).indices
        among = best.unsqueeze(-2).expand(*best.shape[:-1], self.group, self.k)
        values, places = grouped.gather(-1, among).flatten(-2).topk(self.k, dim=-1)
        return values, places // self.k * self.groups + best.gather(-1, places % self.k)

    @staticmethod
    def _inverse_norm(energy: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        kept = energy if total is None else (total - energy).clamp(min=0)
        # as normalize does it: an image without anything left is at cosine 0 from all others
        return 1 / kept.sqrt().clamp(min=1e-12)


def plan_masks(
    masks: torch.Tensor, kept: torch.Tensor, together: Callable[[int], int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Yields mask numbers (r,), the columns that they keep or drop (r, c), and which of both it is.

    Masks of similar numbers of columns come together; the shorter are filled up with column D.

    Args:
        masks: bool (R, D).
        kept: whether a mask is to be computed from what it keeps, bool (R,).
        together: how many masks fit into one chunk, by their number of columns.
    """
    for side in (False, True):
        members = (kept == side).nonzero().flatten()
        lengths = (masks if side else ~masks)[members].sum(dim=1)
        members = members[lengths.argsort()]
        while len(members):
            # the last of the first few has the most columns; its number decides how many are few
            width = int((masks if side else ~masks)[members[: together(0)]].sum(dim=1).max())
            chunk, members = members[: together(width)], members[together(width) :]
            chosen = masks[chunk] if side else ~masks[chunk]
            width = int(chosen.sum(dim=1).max())
            order = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
            yield chunk, torch.where(chosen.gather(1, order), order, masks.shape[1]), side
