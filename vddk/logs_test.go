package vddk

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

func TestLogs(t *testing.T) {
	var out bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: levelNoise}))
	l := newLogs(&Params{File: "[ds] a.vmdk", Password: NewSecret("s3cret%s"), Cookie: NewSecret("ab")}, logger)
	l.add(false, "100%s %n {} \x1b[31mred\x07\x00 line\nnext\r\tone")
	l.add(true, "VDDK_PhoneHome: noise")
	l.add(true, "CEIP: noise")
	l.add(true, "login with s3cret%s failed, tab")
	l.add(true, "a fault <password>s3cret&#37;s</password> of ?p=s3cret%25s and {\"p\":\"\\u00733cret%s\"}")
	l.lines, l.warnings = l.lines[:len(l.lines)-1], l.warnings[:len(l.warnings)-1]
	l.add(true, strings.Repeat("ä", 100_000))
	l.add(true, "broken \xff\xfe utf-8")
	l.add(false, " \n\x00 ")
	l.drain()
	for _, want := range []string{`level=DEBUG msg="vddk: 100%s %n {} [31mred line next  one"`, `level=DEBUG-4 msg="vddk: VDDK_PhoneHome`, "login with *** failed, tab", `disk="[ds] a.vmdk" warning=true`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String()[:600])
		}
	}
	if strings.Contains(out.String(), "s3cret") || strings.Contains(out.String(), "3cret") || strings.Count(out.String(), "\n") != 7 {
		t.Errorf("%d lines, or a secret:\n%.900s", strings.Count(out.String(), "\n"), out.String())
	}
	w := l.lastWarnings()
	if len(w) != 3 || !utf8.ValidString(w[2]) || len(w[1]) > maxLine+3 || !utf8.ValidString(w[1]) {
		t.Errorf("warnings %.200q", w)
	}
	mark := l.mark()
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 2000 {
				l.add(true, fmt.Sprintf("%d/%d", g, i))
			}
		})
	}
	wg.Wait()
	if w := l.lastWarnings(); len(w) != keptWarnings {
		t.Errorf("%d warnings", len(w))
	}
	if s := l.since(mark); len(s) != keptLines {
		t.Errorf("%d lines since the mark", len(s))
	}
	if s := l.since(l.mark()); len(s) != 0 {
		t.Errorf("%q since now", s)
	}
	l.drain()
	l.add(false, "after")
	l.drain()
	if !strings.Contains(out.String(), "lines_left_out=") {
		t.Error("nothing says that lines were left out")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l.run(ctx)
}

// A slow log does not delay the library.
func TestSlowLog(t *testing.T) {
	host, content := newFakeHost(t, 4*mib)
	host.onRead = func(_ int, w *fakeWorker, _ uint64, _ int) error {
		for range 1000 {
			w.log(worker.Warning, "again")
		}
		return nil
	}
	stuck := make(chan struct{})
	d := host.mustOpen(Params{}, Options{Log: slog.New(slog.NewTextHandler(blocking(stuck), &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: nil}))})
	if err := readBoth(t, d, content); err != nil {
		t.Error(err)
	}
	if w := d.LastWarnings(); len(w) != keptWarnings || w[0] != "again" {
		t.Errorf("%q", w)
	}
	close(stuck)
}

type blocking chan struct{}

func (b blocking) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("vddk: again")) {
		<-b
	}
	return len(p), nil
}

// TestLogsHideFormerSecrets checks that a cookie stays hidden after a new one has replaced it.
func TestLogsHideFormerSecrets(t *testing.T) {
	l := newLogs(&Params{File: "[ds] a.vmdk", Cookie: NewSecret("first cookie")}, nil)
	l.add(false, "second cookie")
	l.hide(&Params{Cookie: NewSecret("second cookie"), Password: NewSecret("password")})
	l.hide(&Params{Cookie: NewSecret("second cookie")})
	l.add(false, "first cookie, second cookie, password")
	if got := l.since(0); len(got) != 2 || got[0] != "second cookie" || got[1] != "***, ***, ***" {
		t.Errorf("%q", got)
	}
}
