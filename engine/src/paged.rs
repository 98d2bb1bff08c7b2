//! A deque in pages. `VecDeque` doubles by moving everything into new memory, which stops a shard for milliseconds
//! once it holds some ten thousand batches; this one adds a small page at a time.

use std::collections::VecDeque;

/// Entries of a page.
const PAGE: usize = 64;

/// A deque whose growth costs the same at any length.
#[derive(Debug)]
pub struct PagedDeque<T> {
    /// None is empty; all but the first and the last are full.
    pages: VecDeque<VecDeque<T>>,
}

impl<T> Default for PagedDeque<T> {
    fn default() -> Self {
        Self { pages: VecDeque::new() }
    }
}

impl<T> PagedDeque<T> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match (self.pages.front(), self.pages.back()) {
            (Some(first), Some(last)) if self.pages.len() > 1 => {
                first.len() + (self.pages.len() - 2) * PAGE + last.len()
            }
            (Some(only), _) => only.len(),
            _ => 0,
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The oldest.
    #[must_use]
    pub fn front(&self) -> Option<&T> {
        self.pages.front()?.front()
    }

    /// Adds the newest.
    pub fn push_back(&mut self, value: T) {
        let first = self.pages.is_empty();
        match self.pages.back_mut() {
            Some(page) if page.len() < PAGE => page.push_back(value),
            _ => {
                // Most partitions of a shard with thousands hold a batch or two.
                let mut page = VecDeque::with_capacity(if first { 1 } else { PAGE });
                page.push_back(value);
                self.pages.push_back(page);
            }
        }
    }

    /// Takes the oldest.
    pub fn pop_front(&mut self) -> Option<T> {
        let first = self.pages.front_mut()?;
        let value = first.pop_front();
        if first.is_empty() {
            self.pages.pop_front();
        }
        value
    }

    /// The newest.
    #[must_use]
    pub fn back(&self) -> Option<&T> {
        self.pages.back()?.back()
    }

    /// Takes the newest.
    pub fn pop_back(&mut self) -> Option<T> {
        let last = self.pages.back_mut()?;
        let value = last.pop_back();
        if last.is_empty() {
            self.pages.pop_back();
        }
        value
    }

    /// The page and the place in it of the `index`-th.
    fn locate(&self, index: usize) -> (usize, usize) {
        let first = self.pages.front().map_or(0, VecDeque::len);
        match index.checked_sub(first) {
            None => (0, index),
            Some(beyond) => (1 + beyond / PAGE, beyond % PAGE),
        }
    }

    /// How many from the front satisfy `holds`, which must hold for a prefix only.
    pub fn partition_point(&self, mut holds: impl FnMut(&T) -> bool) -> usize {
        let page = self.pages.partition_point(|p| p.front().is_some_and(&mut holds));
        let Some(page) = page.checked_sub(1) else { return 0 };
        let before: usize = self.pages.iter().take(page.min(1)).map(VecDeque::len).sum();
        before + page.saturating_sub(1) * PAGE + self.pages[page].partition_point(holds)
    }

    /// From the `from`-th on.
    pub fn iter_from(&self, from: usize) -> impl Iterator<Item = &T> {
        let (page, skip) = self.locate(from);
        self.pages.iter().skip(page).flatten().skip(skip)
    }

    /// From the `from`-th on.
    pub fn iter_mut_from(&mut self, from: usize) -> impl Iterator<Item = &mut T> {
        let (page, skip) = self.locate(from);
        self.pages.iter_mut().skip(page).flatten().skip(skip)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_deque(steps in prop::collection::vec((0_u8..5, 0_usize..200), 0..60)) {
            let mut model = VecDeque::new();
            let mut paged = PagedDeque::default();
            let mut next = 0;
            for (kind, count) in steps {
                for _ in 0..count {
                    if kind == 0 {
                        prop_assert_eq!(paged.pop_front(), model.pop_front());
                    } else if kind == 1 {
                        prop_assert_eq!(paged.back(), model.back());
                        prop_assert_eq!(paged.pop_back(), model.pop_back());
                    } else {
                        paged.push_back(next);
                        model.push_back(next);
                        next += 1;
                    }
                }
                prop_assert_eq!(paged.len(), model.len());
                prop_assert_eq!(paged.is_empty(), model.is_empty());
                prop_assert_eq!(paged.front(), model.front());
                let below = model.front().copied().unwrap_or(0) + count;
                let point = model.partition_point(|n| *n < below);
                prop_assert_eq!(paged.partition_point(|n| *n < below), point);
                prop_assert!(paged.iter_from(point).eq(model.range(point..)));
                prop_assert!(paged.iter_mut_from(point).map(|n| *n).eq(model.range(point..).copied()));
            }
        }
    }
}
