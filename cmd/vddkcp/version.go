package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/vddk"
)

// The linker sets version and commit with its flag -X, as the Makefile shows. They are empty in
// a program that go build or go install has built. Other code calls programVersion.
var version, commit string

type versionCommand struct {
	JSON bool `name:"json" help:"Print JSON with more facts about this build."`
}

// Run prints the version.
func (c *versionCommand) Run() error {
	if c.JSON {
		return printJSON(textOutput, describeBuild())
	}
	_, err := fmt.Fprintln(textOutput, versionLine())
	return err
}

// versionFlag is the flag --version, which prints the version and ends the program, whatever
// else the command line has.
type versionFlag bool

// BeforeReset prints the version. kong calls this method if the flag is given, before kong
// checks the rest of the command line.
func (versionFlag) BeforeReset(app *kong.Kong) error {
	if _, err := fmt.Fprintln(app.Stdout, versionLine()); err != nil {
		return err
	}
	app.Exit(0)
	return nil
}

func versionLine() string {
	return fmt.Sprintf("vddkcp %s (%s, %s/%s)", programVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// buildFacts describes the program for scripts. docs/cli.md documents its fields.
type buildFacts struct {
	Version      string `json:"version"`
	Commit       string `json:"commit"`
	Go           string `json:"go"`
	OS           string `json:"os"`
	Arch         string `json:"arch"`
	WorkerSHA256 string `json:"worker_sha256"`
	VDDKVersions []int  `json:"vddk_versions"`
}

func describeBuild() buildFacts {
	info, _ := debug.ReadBuildInfo()
	return buildFacts{
		Version:      programVersion(),
		Commit:       commitOf(commit, info),
		Go:           runtime.Version(),
		OS:           runtime.GOOS,
		Arch:         runtime.GOARCH,
		WorkerSHA256: vddk.WorkerSHA256(),
		VDDKVersions: vddk.LibraryVersions(),
	}
}

// programVersion returns the version of the program.
func programVersion() string {
	info, _ := debug.ReadBuildInfo()
	return versionOf(version, info)
}

// versionOf returns the version that the linker has set or, if there is none, the version of the
// module that the go command has recorded, as go install MODULE@VERSION does. The parameter info
// may be nil.
func versionOf(linked string, info *debug.BuildInfo) string {
	switch {
	case linked != "":
		return linked
	case info != nil && info.Main.Version != "" && info.Main.Version != "(devel)":
		return info.Main.Version
	}
	return "devel"
}

// commitOf returns the commit that the linker has set or, if there is none, the commit that the
// go command has recorded. The result is "" if the commit is unknown.
func commitOf(linked string, info *debug.BuildInfo) string {
	if linked != "" || info == nil {
		return linked
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			return setting.Value
		}
	}
	return ""
}
