//! One request, one answer (HTTP/1.1).

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Result, ensure};

/// All of what is answered to a GET, head included, when it is 200; `basic` is `USER:PASSWORD`.
///
/// # Errors
/// The connection's own, or another answer in words.
pub fn get(mut stream: TcpStream, path: &str, basic: Option<&str>) -> Result<String> {
    let authorization = basic.map_or_else(String::new, |basic| {
        format!(
            "Authorization: Basic {}\r\n",
            super::base64::encode(basic.as_bytes())
        )
    });
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{authorization}\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer:?}");
    Ok(answer)
}
