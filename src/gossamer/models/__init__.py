"""Gated models: conversion, saving, loading, and the op registered with transformers' attention interface."""
