//! Plain HTTP downloads with limits. Trust comes from signatures and digests, never from the transport.

use std::{io::Read, time::Duration};

use thiserror::Error;
use ureq::unversioned::transport::DefaultConnector;

use crate::resolver::OnceResolver;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the next bytes of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for one file as a whole.
const FILE_TIMEOUT: Duration = Duration::from_secs(600);

/// Why a file could not be fetched.
#[derive(Debug, Error)]
pub enum FetchError {
    /// The mirror does not have it.
    #[error("there is no {address} (HTTP {status})")]
    Gone {
        /// What was asked for.
        address: String,
        /// 404 or 410.
        status: u16,
    },
    /// The mirror could not be asked or refused.
    #[error("cannot fetch {address}")]
    Failed {
        /// What was asked for.
        address: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// The answer broke off.
    #[error("cannot read the answer to {address}")]
    Broken {
        /// What was asked for.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The answer is longer than allowed.
    #[error("{address} is longer than {max} bytes")]
    TooLong {
        /// What was asked for.
        address: String,
        /// The limit in bytes.
        max: u64,
    },
}

/// A client that keeps connections open between files.
#[derive(Debug, Clone)]
pub(crate) struct Fetcher {
    agent: ureq::Agent,
}

impl Fetcher {
    pub(crate) fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .timeout_global(Some(FILE_TIMEOUT))
            .user_agent("sovereign-rootfs");
        let (connector, resolver) = (DefaultConnector::default(), OnceResolver::default());
        Self {
            agent: ureq::Agent::with_parts(config.build(), connector, resolver),
        }
    }

    /// Starts a download; the caller limits how much it reads.
    pub(crate) fn open(&self, address: &str) -> Result<impl Read + use<>, FetchError> {
        match self.agent.get(address).call() {
            Ok(answer) => Ok(answer.into_body().into_reader()),
            Err(ureq::Error::StatusCode(status @ (404 | 410))) => Err(FetchError::Gone {
                address: address.to_owned(),
                status,
            }),
            Err(error) => Err(FetchError::Failed {
                address: address.to_owned(),
                source: Box::new(error),
            }),
        }
    }

    /// Downloads a whole small file.
    pub(crate) fn get(&self, address: &str, max: u64) -> Result<Vec<u8>, FetchError> {
        let mut bytes = Vec::new();
        let body = self.open(address)?;
        body.take(max + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| FetchError::Broken {
                address: address.to_owned(),
                source,
            })?;
        if bytes.len() as u64 > max {
            return Err(FetchError::TooLong {
                address: address.to_owned(),
                max,
            });
        }
        Ok(bytes)
    }
}
