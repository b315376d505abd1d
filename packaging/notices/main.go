// Command notices prints the licences of everything that is linked into a Go executable: of the
// modules and of Go itself. Run it in the module whose main package was built:
//
//	notices EXECUTABLE
//
// The list of modules is the one that the go command has recorded in the executable. If a module
// has no licence file, the command fails, so that no package is distributed without it.
package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: notices EXECUTABLE")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "notices:", err)
		os.Exit(1)
	}
}

func run(executable string, w io.Writer) error {
	info, err := buildinfo.ReadFile(executable)
	if err != nil {
		return err
	}
	linked, err := linkedModules(info)
	if err != nil {
		return err
	}
	goroot, err := goCommand(nil, "env", "GOROOT")
	if err != nil {
		return err
	}
	root := strings.TrimSpace(string(goroot))
	linked = append(linked, &module{path: "Go", version: info.GoVersion, dir: root, packages: []string{root}})

	var out bytes.Buffer
	fmt.Fprintf(&out, "%s contains the following software of others. The licences follow in the same order.\n\n", filepath.Base(info.Path))
	for _, m := range linked {
		fmt.Fprintf(&out, "%s %s\n", m.path, m.version)
	}
	for _, m := range linked {
		if err := m.print(&out); err != nil {
			return err
		}
	}
	_, err = w.Write(out.Bytes())
	return err
}

// The type module is a module of which at least one package is linked.
type module struct {
	path, version, dir string
	packages           []string // folders of the linked packages
}

// linkedModules returns the modules in the executable except the main module, sorted by path. It
// asks the go command for the folders of their packages, and checks that these modules are the
// ones that the executable records.
func linkedModules(info *buildinfo.BuildInfo) ([]*module, error) {
	env := os.Environ()
	for _, s := range info.Settings {
		switch s.Key {
		case "GOOS", "GOARCH", "CGO_ENABLED":
			env = append(env, s.Key+"="+s.Value)
		}
	}
	out, err := goCommand(env, "list", "-deps", "-json=Dir,Module", info.Path)
	if err != nil {
		return nil, err
	}
	found := map[string]*module{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			Dir    string
			Module *struct {
				Path, Version, Dir string
				Main               bool
			}
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("output of go list: %w", err)
		}
		if p.Module == nil || p.Module.Main { // a package of the standard library, or our own
			continue
		}
		m := found[p.Module.Path]
		if m == nil {
			m = &module{path: p.Module.Path, version: p.Module.Version, dir: p.Module.Dir}
			found[m.path] = m
		}
		m.packages = append(m.packages, p.Dir)
	}
	recorded := 0
	for _, dep := range info.Deps {
		recorded++
		if m := found[dep.Path]; m == nil || m.version != dep.Version {
			return nil, fmt.Errorf("the executable has %s %s, which go list does not list: build the executable again", dep.Path, dep.Version)
		}
	}
	if recorded != len(found) {
		return nil, fmt.Errorf("the executable has %d modules, but go list lists %d: build the executable again", recorded, len(found))
	}
	return slices.SortedFunc(maps.Values(found), func(a, b *module) int { return strings.Compare(a.path, b.path) }), nil
}

// licenceFile matches the names of files that state a licence. The first submatch is empty for
// files that only add something to a licence.
var licenceFile = regexp.MustCompile(`^(?i:(licen[cs]e|copying)|notice|patents)([-.].*)?$`)

// print writes the texts of all licence files of the module. They are in the folder of the module
// and, for code that a module has taken over from others, in the folders of its packages.
func (m *module) print(out *bytes.Buffer) error {
	folders := map[string]bool{}
	for _, dir := range m.packages {
		for strings.HasPrefix(dir, m.dir) {
			folders[dir] = true
			dir = filepath.Dir(dir)
		}
	}
	licensed := false
	for _, dir := range slices.Sorted(maps.Keys(folders)) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			match := licenceFile.FindStringSubmatch(e.Name())
			if match == nil || !e.Type().IsRegular() || strings.HasSuffix(e.Name(), ".go") {
				continue
			}
			licensed = licensed || match[1] != "" && dir == m.dir
			text, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				return err
			}
			name, err := filepath.Rel(m.dir, filepath.Join(dir, e.Name()))
			if err != nil {
				return err
			}
			fmt.Fprintf(out, "\n%s\n%s %s, file %s:\n\n%s\n", strings.Repeat("=", 78), m.path, m.version, name, bytes.TrimSpace(text))
		}
	}
	if !licensed {
		return fmt.Errorf("%s %s: %w: no file named LICENSE or COPYING in %s", m.path, m.version, fs.ErrNotExist, m.dir)
	}
	return nil
}

func goCommand(env []string, args ...string) ([]byte, error) {
	cmd := exec.Command("go", args...)
	cmd.Env = env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", cmd, err, &stderr)
	}
	return out, nil
}
