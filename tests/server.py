"""A real web server with ranges over a folder, started by the tests: nginx where it is installed, else aiohttp's.

/data/ has the files, /login/ answers each request with a page of HTML. Requests are written to a log, one a line:
status, range, path.
"""

import datetime
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
PAGE = "<!DOCTYPE html><html>log in first</html>" + " " * 3000
CONFIG = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; user root;
events {{}}
http {{
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  log_format m '$status $http_range $uri'; access_log {folder}/access.log m;
  server {{
    listen 127.0.0.1:{port};
    location /data/ {{ root {folder}; }}
    location /login/ {{ root {folder}; error_page 404 =200 /page.html; }}
    location /page.html {{ root {folder}; }}
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serve(data: Path, folder: Path, nginx: bool = NGINX is not None, tls: bool = False) -> Iterator[tuple[str, Path]]:
    """Serve `data` with what the server needs in `folder`; yields its address and its log."""
    port = free_port()
    os.symlink(data, folder / "data")
    (folder / "page.html").write_text(PAGE)
    (folder / "access.log").touch()
    if nginx:
        (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port))
        command = [NGINX, "-c", folder / "nginx.conf", "-p", folder, "-e", folder / "error.log"]
    else:
        command = [sys.executable, __file__, folder, str(port), *([certificate(folder)] if tls else [])]
    process = subprocess.Popen(command)
    try:
        wait_for(port)
        yield f"http{'s' * tls}://127.0.0.1:{port}", folder / "access.log"
    finally:
        process.terminate()
        process.wait(10)


def wait_for(port: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on {port}")


def certificate(folder: Path) -> Path:
    """A self-signed one for 127.0.0.1, with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = made.add_extension(address, False).sign(key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(private + made.public_bytes(encoding))
    return folder / "server.pem"


def main(folder: str, port: str, certificate: str = "") -> None:
    """aiohttp's server."""
    import ssl

    from aiohttp import web
    from aiohttp.abc import AbstractAccessLogger

    class Log(AbstractAccessLogger):
        def log(self, request, response, time) -> None:
            with open(f"{folder}/access.log", "a") as f:
                f.write(f"{response.status} {request.headers.get('Range', '-')} {request.path}\n")

    async def page(request):
        return web.FileResponse(f"{folder}/page.html")

    app, context = web.Application(), None
    app.router.add_get("/login/{name}", page)
    app.router.add_static("/data/", f"{folder}/data/")
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    web.run_app(app, host="127.0.0.1", port=int(port), ssl_context=context, access_log_class=Log, print=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
