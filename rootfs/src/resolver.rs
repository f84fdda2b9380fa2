//! Name resolution that asks once per host and build.
//!
//! ureq resolves for every request, even on a kept connection; dozens of small packages then cost dozens of look-ups,
//! and one lost answer costs the resolver's 5 s (seen with 46 packages: every cold build).

use std::{collections::BTreeMap, sync::Mutex};

use ureq::{
    Error,
    config::Config,
    http::Uri,
    unversioned::{
        resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver},
        transport::NextTimeout,
    },
};

/// ureq's resolver with a memory; it lives for one build, so nothing in it grows old.
#[derive(Debug, Default)]
pub(crate) struct OnceResolver {
    known: Mutex<BTreeMap<String, ResolvedSocketAddrs>>,
    inner: DefaultResolver,
}

impl Resolver for OnceResolver {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        // Held during the look-up on purpose: threads that start together then ask once.
        let mut known = self
            .known
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(addresses) = known.get(&authority) {
            return Ok(addresses.clone());
        }
        let addresses = self.inner.resolve(uri, config, timeout)?;
        known.insert(authority, addresses.clone());
        Ok(addresses)
    }
}
