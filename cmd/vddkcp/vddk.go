package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"

	"vddkcp/vddk"
)

type vddkCommand struct {
	LibDir     string `name:"libdir" help:"Where the library is: the folder of VDDK, its lib64, or the library itself." placeholder:"DIR" type:"path"`
	JSON       bool   `name:"json" help:"Print JSON instead of KEY=VALUE lines."`
	DumpPlugin bool   `help:"Does nothing: the lines that nbdkit vddk --dump-plugin prints are printed anyway."`
}

// libraryFacts is what vddk tells, and its JSON.
type libraryFacts struct {
	DefaultLibDir string          `json:"default_libdir"`
	LibDir        string          `json:"libdir"`
	Library       string          `json:"library"`
	Version       int             `json:"version"`
	Functions     map[string]bool `json:"functions"`
	Missing       []string        `json:"missing_libraries"`
	list          []vddk.Function
}

func (c *vddkCommand) Run(ctx context.Context) error {
	facts := &libraryFacts{DefaultLibDir: vddk.LibDirs[0], Functions: map[string]bool{}, Missing: []string{}}
	library, err := vddk.FindLibrary(c.LibDir)
	if err != nil {
		return fmt.Errorf("vddk: %w", err)
	}
	facts.LibDir, facts.Library, facts.Version = library.Root, library.Path, library.Version
	if facts.list, err = vddk.Functions(library); err != nil {
		return fmt.Errorf("vddk: %w", err)
	}
	for _, f := range facts.list {
		facts.Functions[f.Name] = f.Present
	}
	missing, err := vddk.Missing(library)
	if err != nil {
		return fmt.Errorf("vddk: %w", err)
	}
	facts.Missing = append(facts.Missing, missing...)
	out := standardOutput(ctx)
	if c.JSON {
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		e.SetIndent("", "    ")
		err = e.Encode(facts)
	} else {
		w := bufio.NewWriter(out)
		facts.printLines(w)
		err = w.Flush()
	}
	if err == nil && len(missing) > 0 {
		err = &vddk.MissingError{Library: library.Path, Names: missing}
	}
	if err != nil {
		return fmt.Errorf("vddk: %w", err)
	}
	return nil
}

// printLines prints what scripts of nbdkit vddk --dump-plugin look for.
func (f *libraryFacts) printLines(w *bufio.Writer) {
	fmt.Fprintf(w, "name=vddk\nversion=%s\n", version)
	fmt.Fprintf(w, "vddk_default_libdir=%s\nvddk_has_nfchostport=1\n", f.DefaultLibDir)
	fmt.Fprintf(w, "vddk_library_version=%d\n", f.Version)
	fmt.Fprintf(w, "vddk_dll=%s\nvddk_libdir=%s\n", printable(f.Library), printable(f.LibDir))
	for _, function := range f.list {
		present := 0
		if function.Present {
			present = 1
		}
		fmt.Fprintf(w, "%s=%d\n", function.Name, present)
	}
	for _, name := range f.Missing {
		fmt.Fprintf(w, "vddk_missing_library=%s\n", printable(name))
	}
}
