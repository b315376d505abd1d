package main

import (
	"runtime/debug"
	"testing"
)

func TestVersionOfABuild(t *testing.T) {
	installed := &debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}
	built := &debug.BuildInfo{
		Main:     debug.Module{Version: "(devel)"},
		Settings: []debug.BuildSetting{{Key: "GOARCH", Value: "amd64"}, {Key: "vcs.revision", Value: "abc"}},
	}
	for name, test := range map[string]struct {
		version, commit         string
		info                    *debug.BuildInfo
		wantVersion, wantCommit string
	}{
		"make":            {"v1.0.0-2-gdef", "def", built, "v1.0.0-2-gdef", "def"},
		"go install":      {"", "", installed, "v1.2.3", ""},
		"go build":        {"", "", built, "devel", "abc"},
		"no information":  {"", "", nil, "devel", ""},
		"nothing in here": {"", "", &debug.BuildInfo{}, "devel", ""},
	} {
		if got := versionOf(test.version, test.info); got != test.wantVersion {
			t.Errorf("%s: version %q, want %q", name, got, test.wantVersion)
		}
		if got := commitOf(test.commit, test.info); got != test.wantCommit {
			t.Errorf("%s: commit %q, want %q", name, got, test.wantCommit)
		}
	}
}
