package store

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

func TestSocketOfAProcessThatIsGoneIsReplacedAndNoOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	first, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if l, err := listenUnix(path); err == nil {
		_ = l.Close()
		t.Fatal("the socket of a live process was taken")
	}
	first.SetUnlinkOnClose(false) // as a killed process leaves it
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := listenUnix(path)
	if err != nil {
		t.Fatalf("a dead socket was not replaced: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestLongHostNamesHaveSocketsThatFit(t *testing.T) {
	const sunPath = 107 // bytes of a unix socket's address, less its NUL
	seen := map[string]bool{}
	for _, host := range []string{"a", strings.Repeat("h", 255), strings.Repeat("h", 254) + "i"} {
		p := SocketPath("/run/basalt", [16]byte{1}, host)
		if len(p) > sunPath || seen[p] {
			t.Errorf("host of %d bytes: %s (%d bytes), or not its own", len(host), p, len(p))
		}
		seen[p] = true
	}
}

func TestErrorsKeepTheirExitCodeAcrossTheControlSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "host.sock")
	l, err := listenControl(path)
	if err != nil {
		t.Fatal(err)
	}
	c := &control{
		l: l, log: slog.New(slog.DiscardHandler),
		handle: func(_ context.Context, r Request) (Response, error) {
			if r.Verb == VerbPing {
				return Response{}, nil
			}
			return Response{}, errors.New("no such thing as " + r.Path)
		},
		code: func(error) int { return 3 },
	}
	done := make(chan struct{})
	go func() { defer close(done); c.serve(t.Context()) }()
	if _, err := Ask(t.Context(), path, Request{Verb: VerbPing}); err != nil {
		t.Errorf("ping: %v", err)
	}
	_, err = Ask(t.Context(), path, Request{Verb: VerbInfo, Path: "/d"})
	if remote, ok := errors.AsType[*RemoteError](err); !ok || remote.Code != 3 || remote.Message != "no such thing as /d" {
		t.Errorf("the holder's error came as %v", err)
	}
	// Nonsense is answered with an error, and the next one is served.
	nonsense, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nonsense.Write([]byte(`{"verb":7}` + "\n")); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4096)
	if n, err := nonsense.Read(answer); err != nil || !strings.Contains(string(answer[:n]), `"error"`) {
		t.Errorf("nonsense was answered with %q, %v", answer[:n], err)
	}
	if err := errors.Join(nonsense.Close(), l.Close()); err != nil {
		t.Fatal(err)
	}
	<-done
	if _, err := Ask(t.Context(), path, Request{Verb: VerbPing}); !errors.Is(err, ErrNoControl) {
		t.Errorf("a host that is gone: %v", err)
	}
}

func TestURIsNameAnyExport(t *testing.T) {
	for _, c := range []struct{ listen, export, want string }{
		{"unix:/run/a.sock", "vm1/d0", "nbd+unix:///vm1/d0?socket=/run/a.sock"},
		{"unix:/run/a b.sock", "vm 1/ü@x", "nbd+unix:///vm%201/%C3%BC%40x?socket=/run/a%20b.sock"},
		{"tcp:127.0.0.1:10809", "d", "nbd://127.0.0.1:10809/d"},
	} {
		if got := URI(c.listen, c.export); got != c.want {
			t.Errorf("%s on %s: %s, want %s", c.export, c.listen, got, c.want)
		}
	}
}
