//! What a request names more than once. Nobody could tell the answers apart, or which of two contradicting changes was meant: Kafka
//! refuses it, and answers once.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
};

/// How a name stands in a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Named {
    /// Nowhere else.
    Once,
    /// Again further on.
    First,
    /// Before, too.
    Again,
}

/// Counts names, and is then asked for each, in order.
pub struct Repeats<K>(HashMap<K, (usize, bool)>);

impl<K: Eq + Hash> Repeats<K> {
    /// Of a request that gives these.
    pub fn among(names: impl Iterator<Item = K>) -> Self {
        let mut counts: HashMap<K, (usize, bool)> = HashMap::new();
        for name in names {
            counts.entry(name).or_default().0 += 1;
        }
        Self(counts)
    }

    /// The next name of the request.
    pub fn next(&mut self, name: &K) -> Named {
        match self.0.get_mut(name) {
            Some((2.., seen)) => {
                if std::mem::replace(seen, true) {
                    Named::Again
                } else {
                    Named::First
                }
            }
            _ => Named::Once,
        }
    }
}

/// Leaves what stands in a request again out of it: there is one answer to both.
pub fn leave_out<T, K: Eq + Hash>(named: &mut Vec<T>, name: impl Fn(&T) -> K) {
    let mut seen = HashSet::with_capacity(named.len());
    named.retain(|item| seen.insert(name(item)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_told_from_what_is_named_once() {
        let names = ["a", "b", "a", "c", "a"];
        let mut repeats = Repeats::among(names.into_iter());
        let told = names.map(|name| repeats.next(&name));
        assert_eq!(
            told,
            [Named::First, Named::Once, Named::Again, Named::Once, Named::Again]
        );
    }
}
