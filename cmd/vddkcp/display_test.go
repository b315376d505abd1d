package main

import (
	"bufio"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/progress"
)

// TestCopyOnTerminals runs copies on terminals of two sizes. No line that is drawn may be longer
// than the terminal is wide, and nothing of the bar may be left when a copy ends.
func TestCopyOnTerminals(t *testing.T) {
	escape := regexp.MustCompile("\x1b\\[[?0-9]*[A-Za-z]")
	for _, size := range []struct{ columns, rows uint16 }{{80, 24}, {40, 24}, {20, 3}} {
		dir := t.TempDir()
		random(t, filepath.Join(dir, "d"), 4<<20)
		cmd := command(t, "d", "o", "--rate-limit", "4M", "--request-size", "64KiB")
		cmd.Dir = dir
		terminal, err := startSized(cmd, true, size.columns, size.rows)
		if err != nil {
			t.Fatal(err)
		}
		shown, err := io.ReadAll(terminal) // ends with EIO
		if waited := cmd.Wait(); waited != nil {
			t.Fatalf("%v, %v\n%s", waited, err, shown)
		}
		terminal.Close()
		text := string(shown)
		bars := strings.Count(text, "copy ")
		if bars < 3 || !strings.Contains(text, "elapsed") || strings.Contains(text, "[#") != (size.columns == 80) {
			t.Errorf("%d columns: %d bars:\n%q", size.columns, bars, text)
		}
		end := strings.LastIndex(text, "\x1b[J")
		drawn, closing := escape.ReplaceAllString(text[:max(end, 0)], ""), text[max(end, 0):]
		for _, line := range strings.Split(drawn, "\n") {
			if line = strings.Trim(line, "\r"); len(line) >= int(size.columns) {
				t.Errorf("%d columns: a line of %d: %q", size.columns, len(line), line)
			}
		}
		if !regexp.MustCompile(`^\x1b\[Jo: 4\.0 MiB in [0-9.]+ s \([0-9.]+ [KM]iB/s\)\r\n$`).MatchString(closing) {
			t.Errorf("%d columns: the closing line: %q", size.columns, closing)
		}
	}
}

// TestProgressJSONIsPlanned checks the JSON lines of copies with --verify, holes, zeros and
// --resume: what is planned stays the same, and all of it is done at the end.
func TestProgressJSONIsPlanned(t *testing.T) {
	for name, args := range map[string][]string{
		"raw": {"out.raw"}, "raw, verified": {"out.raw", "--verify"}, "qcow2, verified": {"out.qcow2", "--verify", "--compress", "zlib"},
		"vmdk, verified": {"out.vmdk", "--verify"}, "null": {"null:"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // the copies are slow on purpose
			dir := t.TempDir()
			src := filepath.Join(dir, "disk.raw")
			random(t, src, 6<<20)
			zeros, err := os.OpenFile(src, os.O_WRONLY, 0)
			if err == nil {
				_, err = zeros.WriteAt(make([]byte, 1<<20), 2<<20)
			}
			if err != nil || zeros.Close() != nil {
				t.Fatal(err)
			}
			if err := syscall.Truncate(src, 9<<20+512); err != nil {
				t.Fatal(err)
			}
			run := append([]string{src, args[0], "--progress", "json", "--rate-limit", "6MiB", "--request-size", "64KiB"}, args[1:]...)
			planned := checkPlanned(t, dir, false, run...)
			if name == "vmdk, verified" || args[0] == "null:" {
				return // cannot be resumed
			}
			// A copy that is stopped, and the rest of it.
			run = append(run, "--force")
			checkPlanned(t, dir, true, append(run, "--rate-limit", "2MiB")...)
			if rest := checkPlanned(t, dir, false, append(run, "--resume")...); rest >= planned {
				t.Errorf("the rest has %d planned bytes, and all was %d", rest, planned)
			}
		})
	}
}

// checkPlanned runs a copy, checks its JSON lines and returns how much was planned. If the
// parameter interrupt is true, the copy gets a signal after it has copied something.
func checkPlanned(t *testing.T, dir string, interrupt bool, args ...string) (planned int64) {
	t.Helper()
	cmd := command(t, args...)
	cmd.Dir = dir
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var last progress.Line
	for lines := bufio.NewScanner(pipe); lines.Scan(); {
		var line progress.Line
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("%v: %s", err, lines.Text())
		}
		if line.Type != "progress" || line.Phase == "plan" {
			continue
		}
		if last.Type != "" && (line.BytesPlanned != last.BytesPlanned || line.BytesSkipped != last.BytesSkipped) || line.BytesDone < last.BytesDone || line.BytesDone > line.BytesPlanned {
			t.Errorf("%s\nafter %+v", lines.Text(), last)
		}
		if interrupt && line.BytesDone > 0 {
			interrupt = false
			cmd.Process.Signal(syscall.SIGINT)
		}
		last = line
	}
	stopped := cmd.Wait() != nil
	if done := last.BytesDone == last.BytesPlanned; done == stopped || last.BytesPlanned == 0 {
		t.Errorf("stopped %v, the last line is %+v", stopped, last)
	}
	return last.BytesPlanned
}
