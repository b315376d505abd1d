package vddk

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

func TestParseConfig(t *testing.T) {
	const size, count = "vixDiskLib.nfcAio.Session.BufSizeIn64KB", "vixDiskLib.nfcAio.Session.BufCount"
	for _, test := range []struct {
		name, text string
		asked      NFCBuffers
		want       string
		err        string
	}{
		{"nothing", "", NFCBuffers{}, size + "=16\n" + count + "=4\n", ""},
		{"the user's own stays", "# mine\ntmpDirectory = \"/var/tmp/x\"\r\nvixDiskLib.nfc.LogLevel=1", NFCBuffers{},
			"# mine\ntmpDirectory = \"/var/tmp/x\"\nvixDiskLib.nfc.LogLevel=1\n" + size + "=16\n" + count + "=4\n", ""},
		{"the user's buffers", size + " = \"32\"\n" + count + "=2\nx=1\n", NFCBuffers{}, "x=1\n" + size + "=32\n" + count + "=2\n", ""},
		{"one of them, in any case", strings.ToUpper(size) + "=1\n", NFCBuffers{}, size + "=1\n" + count + "=4\n", ""},
		{"asked for by flag", size + "=32\n", NFCBuffers{Size: 512 << 10, Count: 8}, size + "=8\n" + count + "=8\n", ""},
		{"a comment is no setting", "# " + size + "=1\n", NFCBuffers{}, "# " + size + "=1\n" + size + "=16\n" + count + "=4\n", ""},
		{"no number", "x=1\n" + size + "=many\n", NFCBuffers{}, "", `FILE: line 2: ` + size + ` is "many", expected a number from 1 to 65535`},
		{"zero", count + "=0", NFCBuffers{}, "", `expected a number from 1`},
		{"not a multiple", "", NFCBuffers{Size: 100000, Count: 1}, "", "must be a multiple of 64 KiB"},
	} {
		c, err := parseConfig("FILE", test.text, test.asked)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%s: %v, want %q", test.name, err, test.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if got := string(c.file(c.buffers)); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

func TestConfigOfWorker(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("HOME", dir)
	if err := os.MkdirAll(filepath.Join(dir, ".vmware"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".vmware/config"), []byte("home=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mine := filepath.Join(dir, "mine")
	if err := os.WriteFile(mine, []byte("mine=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for config, want := range map[string]string{mine: "mine=1\n", "": "home=1\n"} {
		host, _ := newFakeHost(t, mib)
		seen := ""
		host.onConfig = func(c worker.Config) {
			b, err := os.ReadFile(c.ConfigFile) // as a worker process would
			if err != nil {
				t.Error(err)
			}
			seen = string(b)
		}
		host.mustOpen(Params{Config: config}, Options{})
		if config == "" {
			if _, err := os.Stat("/etc/vmware/config"); err == nil {
				continue // the other file takes precedence
			}
		}
		if !strings.HasPrefix(seen, want) || !strings.Contains(seen, "BufSizeIn64KB=16\n") {
			t.Errorf("with --config %q the library sees %q", config, seen)
		}
	}
	host, _ := newFakeHost(t, mib)
	if _, err := host.open(t.Context(), Params{Config: filepath.Join(dir, "none")}, Options{}); err == nil || host.starts != 0 {
		t.Errorf("a configuration file that is not there: %v", err)
	}
}
