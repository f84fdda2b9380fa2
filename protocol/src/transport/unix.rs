//! Plain Unix sockets.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::net::{UnixListener, UnixStream};

use super::{Address, DialError};
use crate::limits::SOCKET_PATH_BYTES;

pub(super) async fn dial(path: &Path, address: &Address) -> Result<UnixStream, DialError> {
    UnixStream::connect(path)
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => DialError::Gone(address.clone()),
            _ => DialError::Io(address.clone(), error),
        })
}

/// Listens on a Unix socket that only its owner may open, in the place of a dead one.
///
/// # Errors
/// `AddrInUse` when somebody answers there; `InvalidInput` when the path is over
/// [`SOCKET_PATH_BYTES`]; else the system's own.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let length = path.as_os_str().len();
    if length > SOCKET_PATH_BYTES {
        let text = format!(
            "socket path of {length} bytes is over {SOCKET_PATH_BYTES}: {}",
            path.display()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            let text = format!("{} is in use", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
