//! Values at places, in pages that copies share until they are written to: a copy of a hundred thousand values takes microseconds, and
//! may go to another thread.

use std::sync::Arc;

/// Values of a page.
const PAGE: usize = 64;

type Pages<T> = Vec<Arc<Vec<Option<T>>>>;

/// Values at places that stay theirs until they are taken out.
#[derive(Clone, Debug)]
pub struct Slab<T> {
    pages: Pages<T>,
    free: Vec<usize>,
}

/// The values of a slab as of some time.
#[derive(Clone, Debug)]
pub struct Snapshot<T>(Pages<T>);

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            pages: Vec::new(),
            free: Vec::new(),
        }
    }
}

fn values<T>(pages: &Pages<T>) -> impl Iterator<Item = &T> {
    pages.iter().flat_map(|page| page.iter().flatten())
}

impl<T> Snapshot<T> {
    /// How many there may be.
    #[must_use]
    pub fn places(&self) -> usize {
        self.0.iter().map(|page| page.len()).sum()
    }

    /// The values, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        values(&self.0)
    }
}

impl<T: Clone> Slab<T> {
    /// Puts a value in a free place.
    pub fn insert(&mut self, value: T) -> usize {
        if let Some(place) = self.free.pop() {
            *self.slot(place) = Some(value);
            return place;
        }
        if self.pages.last().is_none_or(|page| page.len() == PAGE) {
            self.pages.push(Arc::default());
        }
        let last = self.pages.len() - 1;
        let page = Arc::make_mut(&mut self.pages[last]);
        page.push(Some(value));
        last * PAGE + page.len() - 1
    }

    fn slot(&mut self, place: usize) -> &mut Option<T> {
        &mut Arc::make_mut(&mut self.pages[place / PAGE])[place % PAGE]
    }

    /// The value at a place.
    #[must_use]
    pub fn get(&self, place: usize) -> Option<&T> {
        self.pages.get(place / PAGE)?.get(place % PAGE)?.as_ref()
    }

    /// The value at a place, to change it.
    pub fn get_mut(&mut self, place: usize) -> Option<&mut T> {
        self.get(place)?;
        self.slot(place).as_mut()
    }

    /// Takes a value out.
    pub fn remove(&mut self, place: usize) -> Option<T> {
        self.get(place)?;
        self.free.push(place);
        self.slot(place).take()
    }

    /// The values, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        values(&self.pages)
    }

    /// The values as they are now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot<T> {
        Snapshot(self.pages.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert,
        Change(usize),
        Remove(usize),
        Snapshot,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => Just(Step::Insert),
            3 => (0..300_usize).prop_map(Step::Change),
            2 => (0..300_usize).prop_map(Step::Remove),
            1 => Just(Step::Snapshot),
        ];
        prop::collection::vec(step, 1..600)
    }

    proptest! {
        /// Beside a map by place; what was taken as a snapshot stays as it was.
        #[test]
        fn values_stay_at_their_places_and_snapshots_as_they_were(steps in steps()) {
            let mut slab = Slab::default();
            let mut model: BTreeMap<usize, usize> = BTreeMap::new();
            let mut taken = Vec::new();
            for (n, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Insert => {
                        let place = slab.insert(n);
                        prop_assert!(model.insert(place, n).is_none(), "place {} is taken", place);
                    }
                    Step::Change(place) => {
                        prop_assert_eq!(slab.get(place), model.get(&place));
                        if let Some(value) = slab.get_mut(place) {
                            *value = n;
                            model.insert(place, n);
                        }
                    }
                    Step::Remove(place) => prop_assert_eq!(slab.remove(place), model.remove(&place)),
                    Step::Snapshot => taken.push((slab.snapshot(), model.clone())),
                }
            }
            taken.push((slab.snapshot(), model));
            for (snapshot, model) in taken {
                prop_assert!(snapshot.iter().eq(model.values()));
            }
        }
    }
}
