package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"slices"
	"time"
)

// The media types of the OCI image specification that this program writes.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// The type descriptor refers to a blob of the layout.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// index is an image index: the list of the images for several architectures, or of the layout.
type index struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Manifests     []descriptor      `json:"manifests"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

// The type manifest is an image for one architecture.
type manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Config        descriptor        `json:"config"`
	Layers        []descriptor      `json:"layers"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

// The type config says how a container of the image is started.
type config struct {
	Created      time.Time     `json:"created"`
	Architecture string        `json:"architecture"`
	OS           string        `json:"os"`
	Config       runtimeConfig `json:"config"`
	RootFS       struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
	History []history `json:"history"`
}

type runtimeConfig struct {
	User       string            `json:"User"`
	Env        []string          `json:"Env"`
	Entrypoint []string          `json:"Entrypoint"`
	WorkingDir string            `json:"WorkingDir"`
	Labels     map[string]string `json:"Labels"`
}

type history struct {
	Created   time.Time `json:"created"`
	CreatedBy string    `json:"created_by"`
}

// The type layout collects the blobs of an image layout in memory.
type layout struct {
	options
	blobs map[string][]byte // by name in the layout
}

func newLayout(o options) *layout {
	l := &layout{options: o, blobs: map[string][]byte{}}
	l.blobs["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	return l
}

// addBlob adds a blob and returns a descriptor of it.
func (l *layout) addBlob(mediaType string, content []byte) descriptor {
	sum := sha256.Sum256(content)
	name := hex.EncodeToString(sum[:])
	l.blobs["blobs/sha256/"+name] = content
	return descriptor{MediaType: mediaType, Digest: "sha256:" + name, Size: len(content)}
}

func (l *layout) addJSON(mediaType string, value any) (descriptor, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return descriptor{}, err
	}
	return l.addBlob(mediaType, text), nil
}

// addImage adds the image for one architecture. It has two layers, because the packages change
// less often than vddkcp.
func (l *layout) addImage(arch, debs, files string) (descriptor, error) {
	system, err := systemFiles(debs, l.time)
	if err != nil {
		return descriptor{}, err
	}
	own, err := ownFiles(files, l.time)
	if err != nil {
		return descriptor{}, err
	}
	c := config{Created: l.time, Architecture: arch, OS: "linux", Config: runtimeConfig{
		User:       "107:107",
		Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"},
		Entrypoint: []string{"/usr/local/bin/vddkcp"},
		WorkingDir: "/",
		Labels:     l.annotations(),
	}}
	c.RootFS.Type = "layers"
	m := manifest{SchemaVersion: 2, MediaType: typeManifest, Annotations: l.annotations()}
	for _, layer := range []struct {
		origin string
		files  fileTree
	}{{"Debian packages", system}, {"vddkcp", own}} {
		packed, diffID, err := layer.files.pack()
		if err != nil {
			return descriptor{}, err
		}
		m.Layers = append(m.Layers, l.addBlob(typeLayer, packed))
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, diffID)
		c.History = append(c.History, history{l.time, layer.origin})
	}
	if m.Config, err = l.addJSON(typeConfig, c); err != nil {
		return descriptor{}, err
	}
	d, err := l.addJSON(typeManifest, m)
	d.Platform = &platform{arch, "linux"}
	return d, err
}

func (l *layout) annotations() map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       "vddkcp",
		"org.opencontainers.image.description": "Copies VMware virtual disks, out of vSphere or from files",
		"org.opencontainers.image.version":     l.version,
		"org.opencontainers.image.revision":    l.commit,
		"org.opencontainers.image.created":     l.time.Format(time.RFC3339),
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.source":      "https://github.com/vddkcp/vddkcp",
		"org.opencontainers.image.url":         "https://github.com/vddkcp/vddkcp",
	}
}

// finish writes the archive. It contains one image index for all architectures.
func (l *layout) finish(manifests []descriptor) error {
	images, err := l.addJSON(typeIndex, index{2, typeIndex, manifests, l.annotations()})
	if err != nil {
		return err
	}
	images.Annotations = map[string]string{"org.opencontainers.image.ref.name": l.version}
	if l.blobs["index.json"], err = json.Marshal(index{2, typeIndex, []descriptor{images}, nil}); err != nil {
		return err
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, folder := range []string{"blobs/", "blobs/sha256/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: folder, Mode: 0o755, ModTime: l.time}); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(l.blobs)) {
		content := l.blobs[name]
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: l.time}); err != nil {
			return err
		}
		if _, err := w.Write(content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(l.out, archive.Bytes(), 0o644)
}
