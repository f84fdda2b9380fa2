//! Named operations: what does not fit apply and watch carries an id, and runs once for it.
//!
//! A caller whose connection was cut asks again with the same id and hears how the first one
//! ended. Pure: `now_ms` is the keeper's monotonic clock in milliseconds.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::handshake::{HandshakeError, random_hex};
use crate::limits::{OPERATION_KEPT, OPERATIONS};

/// Chosen at random by who asks: 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OperationId(String);

impl OperationId {
    /// An id that nobody else has.
    ///
    /// # Errors
    /// When the kernel gives no randomness.
    pub fn generate() -> Result<Self, HandshakeError> {
        Ok(Self(random_hex::<16>()?))
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Not 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an operation's id has 32 lower-case hexadecimal digits")]
pub struct NotAnId;

impl TryFrom<String> for OperationId {
    type Error = NotAnId;

    fn try_from(text: String) -> Result<Self, NotAnId> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (text.len() == 32 && text.bytes().all(is_digit))
            .then_some(Self(text))
            .ok_or(NotAnId)
    }
}

impl From<OperationId> for String {
    fn from(id: OperationId) -> Self {
        id.0
    }
}

/// What is known of an operation when somebody asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun<T> {
    /// Nothing: it is to be run now.
    Fresh,
    /// It runs.
    Running,
    /// It ended like this.
    Ended(T),
}

/// The operations that run, and the results of the last ones.
#[derive(Debug)]
pub struct Operations<T> {
    /// Oldest first; a result with the time it came.
    known: VecDeque<(OperationId, Option<(u64, T)>)>,
}

impl<T> Default for Operations<T> {
    fn default() -> Self {
        Self {
            known: VecDeque::new(),
        }
    }
}

impl<T: Clone> Operations<T> {
    /// Takes note that `id` runs from now on, unless it was begun before. Whoever is told
    /// [`Begun::Fresh`] calls [`Self::ended`] or [`Self::never_ran`]; how many may run at once is his limit.
    pub fn begin(&mut self, id: &OperationId, now_ms: u64) -> Begun<T> {
        let kept_ms = u64::try_from(OPERATION_KEPT.as_millis()).unwrap_or(u64::MAX);
        let is_kept = |ended: &Option<(u64, T)>| {
            ended
                .as_ref()
                .is_none_or(|(at_ms, _)| now_ms.saturating_sub(*at_ms) <= kept_ms)
        };
        self.known.retain(|(_, ended)| is_kept(ended));
        match self.known.iter().find(|(known, _)| known == id) {
            Some((_, Some((_, result)))) => Begun::Ended(result.clone()),
            Some((_, None)) => Begun::Running,
            None => {
                self.known.push_back((id.clone(), None));
                Begun::Fresh
            }
        }
    }

    /// Keeps the result, at most [`OPERATIONS`] of them and each for [`OPERATION_KEPT`].
    pub fn ended(&mut self, id: &OperationId, result: T, now_ms: u64) {
        self.never_ran(id);
        self.known.push_back((id.clone(), Some((now_ms, result))));
        let results = self.known.iter().filter(|(_, ended)| ended.is_some()).count();
        if results > OPERATIONS
            && let Some(oldest) = self.known.iter().position(|(_, ended)| ended.is_some())
        {
            self.known.remove(oldest);
        }
    }

    /// Forgets an operation that could not be begun: it may be asked for again.
    pub fn never_ran(&mut self, id: &OperationId) {
        self.known.retain(|(known, _)| known != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> OperationId {
        OperationId::try_from(format!("{n:032x}")).unwrap()
    }

    #[test]
    fn an_operation_runs_once() {
        let mut operations = Operations::default();
        assert_eq!(operations.begin(&id(1), 0), Begun::Fresh);
        assert_eq!(operations.begin(&id(1), 1), Begun::Running);
        assert_eq!(operations.begin(&id(2), 1), Begun::Fresh);
        operations.ended(&id(1), 'a', 2);
        assert_eq!(operations.begin(&id(1), 3), Begun::Ended('a'));
        operations.never_ran(&id(2));
        assert_eq!(operations.begin(&id(2), 3), Begun::Fresh);
    }

    #[test]
    fn a_result_is_forgotten_after_its_time_or_behind_too_many_but_nothing_that_runs() {
        let kept_ms = u64::try_from(OPERATION_KEPT.as_millis()).unwrap();
        let mut operations = Operations::default();
        for n in [0, 1] {
            assert_eq!(operations.begin(&id(n), 0), Begun::Fresh);
        }
        operations.ended(&id(1), 0, 5);
        assert_eq!(operations.begin(&id(1), 5 + kept_ms), Begun::Ended(0));
        assert_eq!(operations.begin(&id(1), 6 + kept_ms), Begun::Fresh);
        operations.ended(&id(1), 1, 6 + kept_ms);
        for n in 2..2 + OPERATIONS {
            operations.ended(&id(n), n, 6 + kept_ms);
        }
        assert_eq!(operations.begin(&id(1), 6 + kept_ms), Begun::Fresh);
        assert_eq!(operations.begin(&id(2), 6 + kept_ms), Begun::Ended(2));
        assert_eq!(operations.begin(&id(0), 6 + kept_ms), Begun::Running);
    }

    #[test]
    fn an_id_is_32_digits() {
        let one = OperationId::generate().unwrap();
        let two = OperationId::generate().unwrap();
        assert_ne!(one, two);
        assert_eq!(OperationId::try_from(one.to_string()), Ok(one));
        for text in ["", "0", &"0".repeat(33), &"G".repeat(32), &"A".repeat(32)] {
            assert_eq!(OperationId::try_from(text.to_owned()), Err(NotAnId), "{text}");
        }
    }
}
