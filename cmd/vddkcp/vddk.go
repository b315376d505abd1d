package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/vddk"
)

type vddkCommand struct {
	LibDir     string `name:"libdir" help:"The VDDK library: the folder of the distribution, its folder lib64, or the file of the library itself." env:"VDDKCP_LIBDIR" placeholder:"DIR" type:"path"`
	JSON       bool   `name:"json" help:"Print JSON instead of KEY=VALUE lines."`
	DumpPlugin bool   `help:"Has no effect. The flag is accepted for scripts that were written for nbdkit vddk --dump-plugin, which prints the same lines."`
}

// libraryFacts is what vddkcp vddk prints, as text or as JSON.
type libraryFacts struct {
	DefaultLibDir string          `json:"default_libdir"`
	LibDir        string          `json:"libdir"`
	Library       string          `json:"library"`
	Version       int             `json:"version"`
	Functions     map[string]bool `json:"functions"`
	Transports    string          `json:"transport_modes"` // empty if unknown
	Missing       []string        `json:"missing_libraries"`
	list          []vddk.Function
}

func (c *vddkCommand) Run(ctx context.Context, logs *logFlags) error {
	facts := &libraryFacts{DefaultLibDir: vddk.LibDirs[0], Functions: map[string]bool{}, Missing: []string{}}
	library, err := vddk.FindLibrary(c.LibDir)
	if err != nil {
		return fmt.Errorf("vddk: %w", orOverNFC(err))
	}
	facts.LibDir, facts.Library, facts.Version = library.Root, library.Path, library.Version
	if facts.list, err = vddk.Functions(library); err != nil {
		return fmt.Errorf("vddk: %w", err)
	}
	for _, f := range facts.list {
		facts.Functions[f.Name] = f.Present
	}
	facts.Missing = append(facts.Missing, vddk.Missing(library)...)
	loading, cancel := context.WithTimeoutCause(ctx, loadTimeout, fmt.Errorf("the VDDK library %s did not load within %s", library.Path, loadTimeout))
	defer cancel()
	var failed error
	facts.Transports, failed = vddk.TransportModes(loading, library)
	if err := facts.print(standardOutput(ctx), c.JSON); err != nil {
		return fmt.Errorf("vddk: %w", err)
	}
	if errors.Is(failed, vddk.ErrNoWorker) {
		logs.warn(failed.Error())
		failed = nil
		if len(facts.Missing) > 0 {
			failed = &vddk.MissingError{Library: library.Path, Names: facts.Missing}
		}
	}
	if failed != nil {
		return fmt.Errorf("vddk: %w", failed)
	}
	return nil
}

// orOverNFC adds to the hint of err, which says that no library was found, that there is another
// way.
func orOverNFC(err error) error {
	return hinted.Error(err, hinted.Of(err)+"; without this library, --via nfc (experimental) reads disks on a server")
}

// loadTimeout is the time limit for loading the library. Loading does not wait for a
// network, because the library opens no connection before a disk is opened.
const loadTimeout = time.Minute

func (f *libraryFacts) print(out io.Writer, asJSON bool) error {
	if asJSON {
		return printJSON(out, f)
	}
	w := bufio.NewWriter(out)
	f.printLines(w)
	return w.Flush()
}

// printLines prints the KEY=VALUE lines that scripts expect from nbdkit vddk
// --dump-plugin.
func (f *libraryFacts) printLines(w *bufio.Writer) {
	fmt.Fprintf(w, "name=vddk\nversion=%s\n", programVersion())
	fmt.Fprintf(w, "vddk_default_libdir=%s\nvddk_has_nfchostport=1\n", f.DefaultLibDir)
	fmt.Fprintf(w, "vddk_library_version=%d\n", f.Version)
	fmt.Fprintf(w, "vddk_dll=%s\nvddk_libdir=%s\n", printable.Name(f.Library), printable.Name(f.LibDir))
	if f.Transports != "" {
		fmt.Fprintf(w, "vddk_transport_modes=%s\n", printable.Name(f.Transports))
	}
	for _, function := range f.list {
		present := 0
		if function.Present {
			present = 1
		}
		fmt.Fprintf(w, "%s=%d\n", function.Name, present)
	}
	for _, name := range f.Missing {
		fmt.Fprintf(w, "vddk_missing_library=%s\n", printable.Name(name))
	}
}
